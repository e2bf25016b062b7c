"""Records, tables, tests and cards of runs."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .card import model_card, write_card
    from .collect import describe_model, make_record, write_record
    from .comparison import write_comparison
    from .curves import plot_curves
    from .record import collect_versions, redact
    from .significance import verdicts
    from .tables import comparison_table, teacher_row_of

__all__ = [
    "collect_versions", "comparison_table", "describe_model", "make_record", "model_card", "plot_curves", "redact",
    "teacher_row_of", "verdicts", "write_card", "write_comparison", "write_record",
]  # fmt: skip

__getattr__, __dir__ = lazy(
    __name__,
    {
        "card": "model_card write_card",
        "collect": "describe_model make_record write_record",
        "comparison": "write_comparison",
        "curves": "plot_curves",
        "record": "collect_versions redact",
        "significance": "verdicts",
        "tables": "comparison_table teacher_row_of",
    },
)
