"""evalkit: turn an instruction-tuned model into one row of a paper's table, and defend every cell."""

from evalkit.errors import EvalkitError, InputError
from evalkit.types import (
    Choose,
    Column,
    Completion,
    DataRef,
    Generate,
    Message,
    Metric,
    Prompt,
    Recipe,
    Request,
    RunSpec,
    Sample,
    Score,
    Task,
)

__version__ = "0.1.0"
__all__ = [
    "Choose",
    "Column",
    "Completion",
    "DataRef",
    "EvalkitError",
    "Generate",
    "InputError",
    "Message",
    "Metric",
    "Prompt",
    "Recipe",
    "Request",
    "RunSpec",
    "Sample",
    "Score",
    "Task",
]
