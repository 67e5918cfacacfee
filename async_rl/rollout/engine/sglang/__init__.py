"""The rollout engine on SGLang's server."""
