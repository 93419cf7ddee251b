"""`helpsteer-rloo plan`: what a run will need in memory and time, and the largest settings that fit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.display.console import say, show
from helpsteer_rloo.run_dir import read_json
from helpsteer_rloo.settings.config import PLAN, PipelineSettings
from helpsteer_rloo.settings.knobs import PlanKnobs
from helpsteer_rloo.settings.parsing import parse_pipeline

if TYPE_CHECKING:
    from helpsteer_rloo.planning.lengths import Corpus
    from helpsteer_rloo.planning.needs import Need
    from helpsteer_rloo.planning.request import Request
    from helpsteer_rloo.planning.search import Remedy, Room
    from helpsteer_rloo.planning.time import Part, Rate


def parse_plan(argv: Sequence[str] | None = None) -> PipelineSettings:
    """Read the flags of the command."""
    return parse_pipeline(argv, PLAN)


@dataclass(frozen=True)
class Plan:
    """Everything that is printed: needs, parts with their times, and how far settings can go within `limit` bytes."""

    request: "Request"
    limit: float | None
    memory: str
    rate: "Rate | None"
    corpus: "Corpus"
    needs: "list[Need]"
    parts: "list[Part]"
    room: "list[Room]"
    remedies: "list[Remedy]"


def run_plan(settings: PipelineSettings) -> None:
    """Print the plan of a run.

    Raises:
        ValueError: the dimensions of a model are not known, or something of the run is not planned.
    """
    plan, own = plan_of(settings), settings.own
    assert isinstance(own, PlanKnobs)
    if own.json:
        print(json.dumps(described(plan), allow_nan=False))
        return
    from helpsteer_rloo.commands.plan_tables import tables, verdict_lines

    for table in tables(plan):
        show(table)
    for line in verdict_lines(plan):
        say(line)


def plan_of(settings: PipelineSettings) -> Plan:
    """The plan of a run.

    Raises:
        ValueError: as `run_plan`.
    """
    from helpsteer_rloo.planning.needs import needs_of
    from helpsteer_rloo.planning.request import Rig
    from helpsteer_rloo.planning.requesting import request_of_pipeline
    from helpsteer_rloo.planning.search import remedies, room_of
    from helpsteer_rloo.planning.time import parts_of

    own = settings.own
    assert isinstance(own, PlanKnobs)
    limit, what, cpu = _memory(own, use_cpu=bool(settings.reward.trl.get("use_cpu")))
    request = request_of_pipeline(settings, Rig(cpu, own.gpus, own.sharding))
    corpus, rate = _corpus(settings, request), _rate(own, cpu=cpu)
    return Plan(
        request=request,
        limit=limit,
        memory=what,
        rate=rate,
        corpus=corpus,
        needs=needs_of(request),
        parts=parts_of(request, corpus, rate),
        room=[] if limit is None else room_of(request, limit),
        remedies=[] if limit is None else remedies(request, limit),
    )


def _memory(own: PlanKnobs, *, use_cpu: bool) -> tuple[float | None, str, bool]:
    """Bytes for a process, of what, and whether that is the memory of a CPU."""
    from helpsteer_rloo.planning.gpus import GPUS
    from helpsteer_rloo.planning.machine import memory_here

    name = _gpu(own)
    if own.gpu_memory_gb is not None:
        return own.gpu_memory_gb * 2**30, f"a GPU of {own.gpu_memory_gb:,.12g} GiB", False
    if name is not None:
        gpu = GPUS[name]
        return gpu.memory * 2**30, f"what a program has of the {gpu.size} GB of a GPU: {name}", False
    if own.gpus > 1 or own.tflops is not None:
        return None, "a GPU", False
    found = memory_here(use_cpu=use_cpu)
    return (None, "this machine", use_cpu) if found is None else (found.bytes, found.what, found.cpu)


def _gpu(own: PlanKnobs) -> str | None:
    """The GPU that is planned for by its name in the table, if one is named."""
    from helpsteer_rloo.planning.gpus import known_gpu

    return None if own.gpu_name is None else known_gpu(own.gpu_name)


def _rate(own: PlanKnobs, *, cpu: bool) -> "Rate | None":
    from helpsteer_rloo.planning.gpus import GPUS, READING, rate_of
    from helpsteer_rloo.planning.machine import measured_rate
    from helpsteer_rloo.planning.time import GIGA, TERA, Rate

    name = _gpu(own)
    if own.measure:
        return measured_rate(use_cpu=cpu)
    if own.tflops is not None:
        reading = own.bandwidth_gbs or (READING * GPUS[name].bandwidth if name else None)
        if reading is None:
            raise ValueError("--tflops needs --bandwidth_gbs beside it: sampling is bound by reading memory.")
        return Rate(
            own.tflops * TERA, own.tflops * TERA, reading * GIGA, f"{own.tflops:,.12g} TFLOP/s, {reading:,.12g} GB/s"
        )
    return None if name is None else rate_of(name)


def _corpus(settings: PipelineSettings, request: "Request") -> "Corpus":
    from helpsteer_rloo.planning.lengths import counted, helpsteer3

    own, room = settings.own, request.rloo.prompt if request.rloo else settings.own.max_length
    assert isinstance(own, PlanKnobs)
    length = request.rewards[0].max_length if request.rewards else own.max_length
    if own.data_json is None:
        return helpsteer3(length, room, english=own.language != "all")
    report = read_json(Path(own.data_json), "Give the data.json of a run.", pipe=True)
    if report is None:
        raise ValueError(f"--data_json {own.data_json}: no such file.")
    return counted(report, length, room, own.data_json)


def described(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON document; bytes are those of one process, operations and seconds of all."""
    from helpsteer_rloo.planning.margin import TOLERANCE, cannot_fit, may_not_fit

    limit = plan.limit
    fits = None if limit is None else all(need.worst.total <= limit for need in plan.needs)
    return {
        "memory": {"bytes": limit, "of": plan.memory},
        "fits": fits,
        "refused_by_the_pipeline": limit is not None and cannot_fit(plan.needs, limit),
        "tolerance": TOLERANCE,
        "near_the_limit": limit is not None and may_not_fit(plan.needs, limit) and not cannot_fit(plan.needs, limit),
        "processes": plan.request.rig.processes,
        "sharding": plan.request.rig.sharding,
        "rate": plan.rate
        and {
            "half_flops": plan.rate.half,
            "single_flops": plan.rate.single,
            "bytes_per_second": plan.rate.reading,
            "source": plan.rate.source,
        },
        "lengths": {
            "source": plan.corpus.source,
            "pairs": plan.corpus.pairs,
            "tokens_a_pair": plan.corpus.work_a_pair.tokens,
            "prompt_tokens": plan.corpus.prompt,
        },
        "stages": [_stage(need, limit) for need in plan.needs],
        "time": [
            {
                "stage": part.stage,
                "part": part.name,
                "tokens": part.tokens,
                "flops": part.flops,
                "seconds": part.seconds,
                "steps": part.steps or None,
            }
            for part in plan.parts
        ],
        "largest_that_fit": {room.flag: {"now": room.value, "largest": room.largest} for room in plan.room},
        "fitting_changes": [
            {"flags": dict(remedy.flags), "bytes": max(need.worst.total for need in remedy.needs)}
            for remedy in plan.remedies
        ],
    }


def _stage(need: "Need", limit: float | None) -> dict[str, Any]:
    return {
        "stage": need.stage,
        "bytes": need.worst.total,
        "moment": need.worst.name,
        "fits": None if limit is None else need.worst.total <= limit,
        "moments": [{"moment": phase.name, "bytes": phase.total, "items": dict(phase.items)} for phase in need.phases],
        "notes": list(need.notes),
    }
