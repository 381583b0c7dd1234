"""The nouns of a search, rewards, the Pareto front, and the one loop.  Never imports torch."""

from .goals import MAXIMISED, Archive, feasible_first
from .loop import SearchResult, run_search
from .pareto import hypervolume, pareto_front
from .protocols import (
    CostModel,
    Evaluator,
    Executor,
    Goal,
    MeasurementCache,
    Meter,
    Request,
    Reward,
    SearchContext,
    Strategy,
    TrialLog,
)
from .space import Architecture, Decision, SearchSpace, TaskSpec, sample_uniform, validate
from .trial import Budget, Cost, Measurement, Trial, child_seed, measurement_key

__all__ = [
    "MAXIMISED",
    "Architecture",
    "Archive",
    "Budget",
    "Cost",
    "CostModel",
    "Decision",
    "Evaluator",
    "Executor",
    "Goal",
    "Measurement",
    "MeasurementCache",
    "Meter",
    "Request",
    "Reward",
    "SearchContext",
    "SearchResult",
    "SearchSpace",
    "Strategy",
    "TaskSpec",
    "Trial",
    "TrialLog",
    "child_seed",
    "feasible_first",
    "hypervolume",
    "measurement_key",
    "pareto_front",
    "run_search",
    "sample_uniform",
    "validate",
]
