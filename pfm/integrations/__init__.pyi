from .dspy import dspy_metric as dspy_metric
from .inspect_ai import inspect_scorer as inspect_scorer
from .langchain import langchain_runnable as langchain_runnable
from .scorer import FlowScorer as FlowScorer
from .trl import trl_reward as trl_reward
