"""The paper's tables and figures from finished runs: one report, for any root of runs."""

from experiments.report.assemble import build as build
