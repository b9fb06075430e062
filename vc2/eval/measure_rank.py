"""A rank of the metrics: `python -m vc2.eval.measure_rank JOB` under any launcher that sets RANK and WORLD_SIZE.

Each rank takes its share of the videos, one at a time: decodes it in the guarded child, reads all that is wanted of it,
and writes its lines. What was read earlier under another list of metrics stays.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from vc2.data.decode import Decoder
from vc2.data.media import MediaError
from vc2.data.rejects import RejectReason
from vc2.errors import ShardCorrupted
from vc2.eval.formulas import Mode
from vc2.eval.look import Look, Networks, read
from vc2.eval.measure import Line, MeasureJob, Task, line_of, lines_key, read_lines, rows_key, unreadable
from vc2.eval.prompts import Prompt
from vc2.eval.ranks import device_of, read_job
from vc2.launch import report, run_rank, this_rank
from vc2.storage import Store, open_store

__all__ = ["DECODE_SECONDS", "main"]

DECODE_SECONDS = 120.0  # for a part of a video


def main(job_uri: str) -> None:
    """Do this rank's share of a job."""
    job = MeasureJob.model_validate_json(read_job(job_uri))
    rank, store = this_rank(), open_store(job.store)
    networks = Networks(job.config, device_of(job.config.device, rank.local_rank))
    prompts = {prompt.id: prompt for prompt in job.config.all_prompts()}
    share = job.tasks[rank.rank :: rank.world_size]
    with Decoder(DECODE_SECONDS) as decoder:
        for number, task in enumerate(share, 1):
            _do(job, store, networks, decoder, prompts[task.id], task)
            report("metrics", min(len(job.tasks), number * rank.world_size), len(job.tasks))


def _do(job: MeasureJob, store: Store, networks: Networks, decoder: Decoder, prompt: Prompt, task: Task) -> None:
    data = store.read(task.file)
    if (found := hashlib.sha256(data).hexdigest()) != task.sha256:
        raise ShardCorrupted(
            f"{task.file}: sha256 {found[:12]}, manifest says {task.sha256[:12]}; delete the samples, make them again"
        )
    look, failure = None, None
    try:
        frames, facts = decoder.frames(data)
        look = Look(prompt, frames, float(Fraction(facts.rate)), networks)
    except MediaError as error:
        failure = error
    made: dict[str, Line] = {}
    for which in task.wanted:
        metric, mode = _parts(which)
        reading = read(metric, mode, look) if look else unreadable(metric, mode, str(failure), _may_pass(failure))
        made[which] = line_of(prompt, metric, mode, reading, job.weights[which])
        if reading.rows is not None:
            store.write(rows_key(job.prefix, made[which]), _npy(reading.rows))
    there = {f"{line.metric}/{line.mode}": line for line in read_lines(store, job.prefix, task.id)}
    store.write(lines_key(job.prefix, task.id), _text((there | made).values()).encode())


def _may_pass(failure: MediaError | None) -> bool:
    """Whether it may be the machine's fault and not the file's."""
    return failure is not None and failure.reason in (RejectReason.DECODE_TIMEOUT, RejectReason.DECODER_CRASHED)


def _parts(which: str) -> tuple[str, Mode]:
    metric, _, mode = which.partition("/")
    return metric, "fixed" if mode == "fixed" else "compat"


def _text(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line.model_dump(mode="json"), sort_keys=True) + "\n" for line in lines)


def _npy(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows.astype(np.float32), allow_pickle=False)
    return buffer.getvalue()


if __name__ == "__main__":
    run_rank(main)
