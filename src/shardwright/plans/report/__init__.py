"""What there is to say about a plan for one model and so many ranks: as plain data, as text, as a page.

report    the report as a value, and as the JSON document of `plan show|infer|check`
text      for a terminal
page      one self-contained HTML file (page.html is its template)
write     the plan itself, as a file that others read
"""

from shardwright.plans.report.report import PlanReport, make_report

__all__ = ["PlanReport", "make_report"]
