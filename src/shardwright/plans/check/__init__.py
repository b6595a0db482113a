"""The static check of a plan: seconds, no weights, every finding with its fix.

subject       the model and the plan, brought together
entries       does every entry name something that can be cut so
composition   do the styles of what belongs together go together
sums          are partial sums added up, and once
tied          is what modules share cut in one way
coverage      what is whole on every rank, and what that costs
heads         how units are dealt
pipeline      names, order, inputs and outputs of the pipeline
stages        the stages as they come out
run           all of them
"""

from shardwright.plans.check.findings import CheckReport, Finding, Severity
from shardwright.plans.check.run import check, check_plan, default_stages, validate_plans
from shardwright.plans.check.subject import Subject

__all__ = ["CheckReport", "Finding", "Severity", "Subject", "check", "check_plan", "default_stages", "validate_plans"]
