"""Judge the finished model by `gate.conditions`, and write the report that says what was done to it.

Consumes: metrics of every stage, reports/evaluate/*.jsonl, reports/merge, reports/train.
Produces: metrics/gate.json; in reports/evaluate: index.html, index.md, figures, scores.json, scores.csv.
Command: python -m stages.report gate=improvement
The verdict is recorded here; the gate stage after it fails on it, when everything else is committed.
"""

import dataclasses
import logging
import shutil
from pathlib import Path

from pipeline import tracking
from pipeline.config import stage
from pipeline.evidence import FILE, read_evidence
from pipeline.files import hash_file, read_json, read_jsonl, write_json, write_text
from pipeline.gates import Outcome, decide, gate_metrics, judge, table
from pipeline.report import find, render, scores_csv, scores_json
from pipeline.report_plots import plot_improvement, plot_scores, rouge_changes
from pipeline.schema import RunConfig
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)
STAGES = ("prepare", "train", "evaluate", "merge")
JUDGED = ("metrics/evaluate.json", "metrics/merge.json")


def run(config: RunConfig, workspace: Workspace) -> None:
    metrics = {name: read_json(workspace.input(f"metrics/{name}.json")) for name in STAGES}
    evidence = read_evidence(*(workspace.input(f"reports/{name}/{FILE}") for name in ("evaluate", "merge")))
    verdicts = judge(config.gate.conditions, evidence, gate_metrics(metrics["evaluate"], metrics["merge"]))
    is_passed = decide(verdicts, config.gate.inconclusive)
    findings = find(evidence, config, verdicts, is_passed)
    answers, contamination = (
        read_jsonl(workspace.input(f"reports/evaluate/{name}.jsonl")) for name in ("predictions", "contamination")
    )
    harness = read_json(workspace.input("reports/evaluate/harness.json"))["results"]
    reports = workspace.output("reports/evaluate/index.html").parent
    pictures = {"Scores with 95 % intervals": reports / "figures/scores.png"}
    plot_scores(findings.estimates, pictures["Scores with 95 % intervals"])
    if answers:
        pictures["What training did to each answer"] = reports / "figures/improvement.png"
        plot_improvement(rouge_changes(answers), reports / "figures/improvement.png")
    for title, name in (("Training", "train/curves.png"), ("Update survival by layer", "merge/survival.png")):
        source = workspace.input(f"reports/{name.partition('/')[0]}") / Path(name).name
        if source.exists():  # with train.method=full nothing is merged
            pictures[title] = reports / "figures" / source.name
            shutil.copyfile(source, pictures[title])
    html, markdown = render(findings, config, metrics, answers, contamination, harness, list(pictures.items()))
    write_text(reports / "index.html", html)
    write_text(reports / "index.md", markdown)
    write_json(reports / "scores.json", scores_json(findings))
    write_text(reports / "scores.csv", scores_csv(findings))
    counts = {f"num_{o}": sum(v.outcome is o for v in verdicts) for o in (Outcome.failed, Outcome.inconclusive)}
    verdict = {
        "passed": is_passed,
        "num_conditions": len(verdicts),
        **counts,
        "conditions": [dataclasses.asdict(verdict) for verdict in verdicts],
        # what was judged, for tracking; pairs, because DVC would show an object's values as metrics
        "inputs": [[name, hash_file(workspace.input(name))] for name in JUDGED],
    }
    write_json(workspace.output("metrics/gate.json"), verdict)
    tracking.record_stage("gate", config.runtime, workspace.outputs)
    logger.info("report: %s\n%s", reports / "index.html", table(verdicts))


main = stage(run, "report")

if __name__ == "__main__":
    main()
