"""FP8 recipes, which Megatron subclasses when it is imported. None can be used."""


class Recipe:
    def __init__(self, *_, **__):
        raise NotImplementedError("the stand-in for Transformer Engine has no FP8")


class DelayedScaling(Recipe):
    pass
