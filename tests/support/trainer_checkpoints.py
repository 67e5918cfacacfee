"""A trainer's updates, saved while it goes on, and made again from the checkpoint."""

import contextlib
import threading

import torch

from async_rl.driver import checkpoint_folder
from async_rl.runtime import manifest
from tests.support.layouts import config_of, shared_out


def weights_of(trainer):
    return {name: None if w is None else w.detach().numpy().copy() for name, w in trainer.weights()}


def step(trainer, shares):
    return trainer.train_step(shares[trainer._place.dp], version=4, oldest_version=3)


@contextlib.contextmanager
def writing_waits_for(event):
    from async_rl.trainer.megatron.writers import FileWriter

    write = FileWriter._write_file

    def waiting(*arguments):
        event.wait(60)
        return write(*arguments)

    FileWriter._write_file = waiting
    try:
        yield
    finally:
        FileWriter._write_file = write


def train_and_save(trainer, updates, later, folder):
    for number, shares in enumerate(updates, start=1):
        step(trainer, shares)
        partial = checkpoint_folder.unfinished(folder, number)
        if trainer._place.rank == 0:
            checkpoint_folder.begin(folder, number)
        torch.distributed.barrier()
        may_write = threading.Event()
        with writing_waits_for(may_write):
            save = trainer.begin_save(partial)
            if number == len(updates):
                # What is written is the state of now, although training goes on before it is written.
                saved = weights_of(trainer)
                later_reports = [step(trainer, shares) for shares in later]
                assert not save.done()
            may_write.set()
        entries = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(entries, save.finish())
        if trainer._place.rank == 0:
            everything = {name: entry for each in entries for name, entry in each.items()}
            assert everything.keys() == {path.name for path in partial.iterdir()}, "each file has an entry"
            checkpoint_folder.commit(partial, everything, keep=2)
        torch.distributed.barrier()
    return saved, later_reports, weights_of(trainer)


def save_in_tp2_x_pp2(ranks, checkpoint, batches, folder):
    """Return ``folder``, with checkpoints after two of four updates, and the results of the uninterrupted run."""
    updates = [shared_out(batch, 1) for batch in batches]
    config = config_of(checkpoint, {"tp": 2, "pp": 2}, **SETTINGS)
    return folder, ranks.run(train_and_save, config, updates[:2], updates[2:], folder)[0]


def save_and_write(trainer, folder, out):
    """Save a checkpoint, and write the Hugging Face folder that the trainer itself makes of its weights."""
    if trainer._place.rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    entries = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(entries, trainer.begin_save(folder).finish())
    if trainer._place.rank == 0:
        manifest.write(folder, {name: entry for each in entries for name, entry in each.items()})
    trainer.save_hf(out)


def restore_and_train(trainer, later, folder):
    path = checkpoint_folder.latest_valid(folder)
    trainer.load(path)
    return (
        checkpoint_folder.step_of(path),
        weights_of(trainer),
        [step(trainer, shares) for shares in later],
        weights_of(trainer),
    )


SETTINGS = {"trainer__optimizer__warmup_steps": 6, "checkpoint__keep": 2}
