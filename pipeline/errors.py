"""What can go wrong through no fault of the code: every message says what, where, why and what to do."""


class PipelineError(Exception):
    """A problem that the user can mend; printed without a traceback, exit code 1."""


class ConfigError(PipelineError, ValueError):
    """Settings that are unknown, of a wrong type, out of range or in conflict."""


class DataError(PipelineError, ValueError):
    """Raw or processed data that cannot be used."""


class ModelError(PipelineError, ValueError):
    """A model or tokenizer folder that cannot be used."""


class TrainingError(PipelineError, RuntimeError):
    """A training that must not go on, or whose result must not be kept."""


class Interrupted(PipelineError, KeyboardInterrupt):
    """Stopped by a signal, with everything kept that the next run needs."""


class ParityError(PipelineError, RuntimeError):
    """A merged model that is not the adapter on its base."""


class GateError(PipelineError, RuntimeError):
    """A finished model that misses a condition of `gate.conditions`."""


class TrackingError(PipelineError, RuntimeError):
    """A tracking store that cannot be used."""


class Pruned(PipelineError):
    """A training that a search gave up: others do better."""
