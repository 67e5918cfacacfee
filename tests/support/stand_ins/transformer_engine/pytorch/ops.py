"""Names of the operation-based interface, in Megatron's annotations only."""


class FusibleOperation:
    pass


class Sequential:
    pass
