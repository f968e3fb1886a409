"""Which cut of a model to take on a machine: will it fit, how long is a step, and how sure is that.

Start reading in api.py; terms.py has the model of time, a function for each term.
"""

from __future__ import annotations

from tpkernels.planner.api import plan, plan_serving
from tpkernels.planner.hardware import Cluster, cluster, this_machine
from tpkernels.planner.predict import predict
from tpkernels.planner.recipe import Job, Recipe
from tpkernels.planner.report import Report
from tpkernels.planner.search import Candidate, Choices
from tpkernels.planner.serving import Serving
from tpkernels.planner.shape import Shape

__all__ = [
    "Candidate", "Choices", "Cluster", "Job", "Recipe", "Report", "Serving", "Shape", "cluster", "plan", "plan_serving",
    "predict", "this_machine",
]  # fmt: skip
