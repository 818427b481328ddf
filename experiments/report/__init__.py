"""A report of the paper's tables and figures, made from a root folder of finished runs."""

from experiments.report.assemble import build as build
