"""The rollout engine on SGLang's server."""

SGLANG_VERSION = "0.5.23"
