"""The `vc2` command: the DAG, its stages and its artifacts, without Prefect.

Exit code 0 only if all is well, 1 for an error that is told in one line, 2 for a command line that cannot be read, 3
for an evaluation that lacks metrics that were asked for, 75 for a run that was asked to stop and left a state to resume
from.
"""

import argparse
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vc2.errors import ConfigError, Preempted, SourceError, StoreError, Vc2Error
from vc2.launch import PREEMPTED, leave

if TYPE_CHECKING:
    from vc2.artifacts import Artifact, Manifest
    from vc2.data.config import ShardStage
    from vc2.eval.config import EvaluateStage
    from vc2.pipeline.driver import PlannedStage
    from vc2.pipeline.preflight import Finding
    from vc2.pipeline.recipes import PipelineConfig
    from vc2.pipeline.sample import LoadedModel
    from vc2.progress import Progress
    from vc2.storage import Store

__all__ = ["described", "in_a_line", "main"]

ARTIFACTS = ("shards", "runs", "samples", "scores", "reports")  # the folders of a store that hold them
NEWEST = 5  # artifacts of each kind that are told of a store
SOURCE_KINDS = ("webvid", "laion-coco", "laion-aesthetics", "journeydb", "webdataset", "folder")
CONVERT_FORMS = ("vc2", "released", "sd-ldm", "sd-diffusers", "diffusers", "diffusers-full", "checkpoint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the `vc2` command; returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.act(options) or 0
    except Preempted as stop:
        print(f"vc2: {stop}", file=sys.stderr)
        return leave(PREEMPTED)
    except Vc2Error as error:
        print(f"vc2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vc2: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        print(f"vc2: not enough memory ({error}); ask for less", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"vc2: {in_a_line(error)}", file=sys.stderr)
        return 1


ADVICE = {
    errno.EACCES: "let this user read and write there, or choose another place",
    errno.EPERM: "let this user read and write there, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EEXIST: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def in_a_line(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left ({error.filename or 'where the output goes'}); make room and try again"
    what = (error.strerror or str(error).strip().rpartition("\n")[2] or type(error).__name__).rstrip(".")
    advice = ADVICE.get(error.errno or 0, "check the disk and the network; the same command goes on from here")
    return f"{error.filename}: {what.lower()}; {advice}" if error.filename else f"{what}; {advice}"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vc2", description="From raw web data to a trained and scored VideoCrafter2, as one reproducible DAG."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, act: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(act=act)
        return added

    run = command("run", _run, "Run a recipe from raw data to report; what is done is reused.")
    run.add_argument(
        "recipe",
        nargs="?",
        default="miniature",
        help="miniature, study, study_gpu, single_gpu or paper (default: miniature)",
    )
    _row_choice(run)
    _stage_choice(run)
    run.add_argument("--stop-after", metavar="STAGE", help="end after this stage")
    run.add_argument("--shards", action="append", default=[], metavar="URI", help="take this shard set for its stage")
    run.add_argument("--checkpoint", default="", metavar="URI", help="take this checkpoint for the stage that made it")
    run.add_argument("--no-preflight", action="store_true", help="do not look first at what the stages need")
    _common(run, repeatable=True)

    plan = command(
        "plan", _plan, "What `vc2 run` would do, why, how long it would take and what it would cost. Runs nothing."
    )
    plan.add_argument("recipe", nargs="?", default="miniature")
    _row_choice(plan)
    _stage_choice(plan)
    plan.add_argument("--stop-after", metavar="STAGE", help="end after this stage")
    plan.add_argument("--shards", action="append", default=[], metavar="URI", help="take this shard set for its stage")
    plan.add_argument("--checkpoint", default="", metavar="URI", help="take this checkpoint for the stage that made it")
    plan.add_argument(
        "--against", default="", metavar="URI",
        help="say what differs from the stages that this artifact was made by (default: from the nearest finished)",
    )  # fmt: skip
    _price_options(plan.add_argument_group("on which hardware, where it was not measured"))
    _common(plan, repeatable=True)

    shard = command("shard", _shard, "Make one source into shards, or a set made earlier into its next generation.")
    shard.add_argument(
        "source", help="webvid, laion-coco, jdb (of the recipe), or a folder, table or tars of your own (path or URI)"
    )
    _shard_options(shard)
    _common(shard, repeatable=True)

    train = command("train", _train, "Train one stage, or go on where it stopped.")
    train.add_argument("stage", choices=["full", "spatial"])
    train.add_argument("--recipe", default="miniature")
    _row_choice(train)
    train.add_argument("--shards", action="append", default=[], metavar="URI")
    train.add_argument("--checkpoint", default="", metavar="URI", help="checkpoint that stage `spatial` starts from")
    _training_estimate_options(train)
    _common(train, repeatable=True)

    precompute = command(
        "precompute", _precompute, "Encode the shard sets of a training stage once: sets of latents to train on."
    )
    precompute.add_argument("stage", choices=["full", "spatial"])
    precompute.add_argument("--recipe", default="miniature")
    precompute.add_argument("--shards", action="append", default=[], metavar="URI", help="instead of the recipe's own")
    precompute.add_argument("--checkpoint", default="", metavar="URI", help="that the stage will start from")
    precompute.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="of what is kept (default: float16)"
    )
    _common(precompute)

    evaluate = command("evaluate", _evaluate, "Sample a checkpoint, score the videos, write the report.")
    evaluate.add_argument("checkpoint", nargs="?", default="", help="URI; default: what the recipe resolves to")
    evaluate.add_argument("--recipe", help="of a checkpoint's evaluation (default: miniature)")
    _evaluate_options(evaluate)
    _common(evaluate, repeatable=True)

    compare = command(
        "compare", _compare,
        "The rows of the paper's Table 3 in a small world: train, sample, judge, one table, a verdict per claim.",
    )  # fmt: skip
    compare.add_argument("recipe", nargs="?", default="study", help="one with a small world (default: study)")
    compare.add_argument(
        "--rows", default="", metavar="ROW,ROW", help="such as F-Spa-DIR,P-Spa-LoRA; their bases come with them "
        "(default: all eleven)",
    )  # fmt: skip
    compare.add_argument("--seeds", default="0,1,2", metavar="N,N", help="of training (default: 0,1,2)")
    compare.add_argument("--dry-run", action="store_true", help="say which stages are to do; run nothing")
    _common(compare)

    references = command(
        "references", _references, "Paint the images that SD_Score compares with, by SDXL: once, and keep them."
    )
    references.add_argument("prompts", type=Path, metavar="PROMPTS", help="a file of prompts, as for vc2 evaluate")
    references.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FOLDER", help="goes on where it was left"
    )
    references.add_argument(
        "--sdxl", type=Path, metavar="FOLDER", help="SDXL base 1.0 (default: where doctor finds it)"
    )
    references.add_argument(
        "--seed", type=int, default=0, help="of the images, drawn without one upstream (default: 0)"
    )
    references.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    references.add_argument("--json", action="store_true", help="print the result as JSON")

    refit = command("refit", _refit, "Fit the aspects' coefficients to people's opinions anew, none of them negative.")
    refit.add_argument("feedback", type=Path, help="CSV or JSON lines: prompt id, model, opinions of 1 to 5 by aspect")
    refit.add_argument(
        "--scores", nargs="+", required=True, metavar="MODEL=URI", help="a scorecard, or a report on it, of each model"
    )
    refit.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the coefficients there, as JSON")
    refit.add_argument("--mode", choices=["compat", "fixed"], default="compat", help="whose values (default: compat)")
    refit.add_argument("--seed", type=int, default=0, help="of the prompts held out (default: 0)")
    refit.add_argument("--held-out", type=_share, default=0.2, metavar="SHARE", help="of the prompts (default: 0.2)")
    refit.add_argument("--json", action="store_true", help="print the result as JSON")

    _study_commands(commands)

    sample = command(
        "sample", _sample, "Make videos from prompts; what is left out is what the model was trained with."
    )
    sample.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a video shows; one video for each")
    sample.add_argument(
        "--checkpoint", required=True, metavar="WHERE", help="URI of a checkpoint, or a folder or file with a model"
    )
    _sample_options(sample)
    sample.add_argument("--work", type=Path, default=None, help="scratch folder (default: VC2_WORK or ./work)")
    sample.add_argument("--json", action="store_true", help="print files and settings as JSON")

    show = command(
        "show",
        _show,
        "Explain an artifact, or a video of `vc2 sample`: what it is, what it was made from, what is in it.",
    )
    show.add_argument(
        "uri",
        help="URI of an artifact, of a store, URI#key of a sample or row in a shard set, or an mp4, GIF or WebP file",
    )
    show.add_argument("--shards", action="store_true", help="of a shard set: a line a shard")
    show.add_argument(
        "--sheet", type=Path, metavar="FILE", help="of a shard set: an HTML page with samples and figures"
    )
    show.add_argument(
        "--lineage",
        type=Path,
        metavar="FILE",
        help="write an HTML page of all that it was made of; with --json as JSON",
    )
    show.add_argument("--json", action="store_true")

    verify = command("verify", _verify, "Re-derive every digest of an artifact and of all it was made from.")
    verify.add_argument("uri")
    verify.add_argument(
        "--samples", action="store_true", help="of shard sets: every sample by itself, not damaged tars alone"
    )
    verify.add_argument("--json", action="store_true")

    index = command("index", _index, "Take tars made by others as a shard set, where they are: nothing is copied.")
    index.add_argument(
        "tars", help="a tar, a folder of tars, or a range in quotes, such as 's3://bucket/{00000..00099}.tar'"
    )
    index.add_argument("--media", choices=["video", "image"], required=True)
    index.add_argument(
        "--recipe", default="miniature", help="where the form of samples comes from (default: miniature)"
    )
    index.add_argument("--name", help="of the set (default: that of the folder)")
    index.add_argument("--license", default="not stated")
    _common(index)

    convert = command(
        "convert",
        _convert,
        "Bring a model from one form to another: ours, VideoCrafter's, Stable Diffusion's, diffusers'.",
    )
    convert.add_argument("source", help="a file or folder in any of the forms, or the URI of a checkpoint")
    convert.add_argument("destination", help="a file or folder; with --to checkpoint a store")
    convert.add_argument("--to", required=True, choices=CONVERT_FORMS, help="docs/weights.md tells what they are")
    convert.add_argument("--fps", type=_count, metavar="N", help="of form diffusers: the one frame rate that it keeps")
    convert.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as it is in the source")
    convert.add_argument("--weights", choices=["ema", "raw"], default="ema", help="where there are both (default: ema)")
    convert.add_argument(
        "--hyper-parameters", type=Path, metavar="FILE.yaml", help="VideoCrafter's own, for what shapes do not tell"
    )
    convert.add_argument("--force", action="store_true", help="replace what is there")
    convert.add_argument("--work", type=Path, default=None, help="scratch folder (default: VC2_WORK or ./work)")
    convert.add_argument("--json", action="store_true", help="print the result as JSON")

    mirror = command("mirror", _mirror, "Copy foreign weights to a place of your own, for machines without a network.")
    mirror.add_argument("destination", help="a folder or s3://bucket/prefix; name it in VC2_MIRROR afterwards")
    mirror.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these weights (`vc2 doctor` lists all)")
    mirror.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="take the files from there")
    mirror.add_argument("--verify", action="store_true", help="read what is there already once more")
    mirror.add_argument("--json", action="store_true", help="print the result as JSON")

    checkpoint = command(
        "checkpoint", _checkpoint, "Make a train state of a run a checkpoint; the run may be going on."
    )
    checkpoint.add_argument("run", help="URI of a run, .../runs/<stage>/<fingerprint>, or of one of its states")
    checkpoint.add_argument("--step", type=_count, metavar="N", help="of the state (default: the newest)")
    checkpoint.add_argument("--work", type=Path, default=None, help="scratch folder (default: VC2_WORK or ./work)")
    checkpoint.add_argument("--json", action="store_true", help="print the result as JSON")

    gc = command(
        "gc", _gc, "Say what nobody needs (old train states, files that no manifest names, leftovers), then delete it."
    )
    gc.add_argument(
        "--store", default=None, help="local folder or s3://bucket/prefix (default: VC2_STORE or work/store)"
    )
    gc.add_argument("--work", type=Path, default=None, help="scratch folder (default: VC2_WORK or ./work)")
    how = gc.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would go, file by file")
    how.add_argument("--yes", action="store_true", help="delete without asking (where nobody can be asked: delete)")
    gc.add_argument("--keep", type=_positive, default=2, metavar="N", help="states of each run, at least (default: 2)")
    gc.add_argument(
        "--grace", type=float, default=24.0, metavar="HOURS",
        help="what is younger stays; below 12 only while nothing is being made (default: 24)",
    )  # fmt: skip
    gc.add_argument("--pin", action="append", default=[], metavar="URI", help="keep this train state for good")
    gc.add_argument("--unpin", action="append", default=[], metavar="URI", help="take the pin away")
    gc.add_argument("--json", action="store_true", help="print the result as JSON")

    doctor = command(
        "doctor", _doctor, "What this machine has and lacks: packages, weights, store; or what a run of a recipe needs."
    )
    doctor.add_argument("recipe", nargs="?", help="look at all that its stages need, and start its ranks for a moment")
    _row_choice(doctor)
    _stage_choice(doctor)
    doctor.add_argument("--stop-after", metavar="STAGE", help="leave out what later stages need")
    doctor.add_argument("--shards", action="append", default=[], metavar="URI", help="as of vc2 run")
    doctor.add_argument("--checkpoint", default="", metavar="URI", help="as of vc2 run")
    _common(doctor)
    doctor.add_argument("--digests", action="store_true", help="read all weights at hand and compare their sha256")
    return parser


def _common(parser: argparse.ArgumentParser, *, repeatable: bool = False) -> None:
    parser.add_argument(
        "--store", default=None, help="local folder or s3://bucket/prefix (default: VC2_STORE or work/store)"
    )
    parser.add_argument("--work", type=Path, default=None, help="scratch folder (default: VC2_WORK or ./work)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--progress",
        choices=["auto", "lines", "json", "none"],
        default="auto",
        help="on stderr: bars on a terminal, else lines (default: auto)",
    )
    if repeatable:
        parser.add_argument(
            "--repeat", type=_count, default=0, metavar="N", help="make it once more, under another fingerprint"
        )
        parser.add_argument(
            "--force", action="store_true", help="make it once more even if it is done (the next free --repeat)"
        )


def _shard_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is sharded")
    what.add_argument("--recipe", default="miniature", help="where the form of samples comes from (default: miniature)")
    what.add_argument("--as", dest="kind", choices=SOURCE_KINDS, help="format of a source of your own (default: seen)")
    what.add_argument("--media", choices=["video", "image"], help="what a source of your own holds")
    what.add_argument(
        "--table",
        help="CSV, TSV, Parquet or JSON lines with columns file and caption; else captions are .txt files",
    )
    what.add_argument("--name", help="name of a source of your own (default: that of the folder)")
    what.add_argument("--limit", type=_positive, metavar="N", help="only the first rows of the source")
    what.add_argument("--shards", type=_span, metavar="A-B", help="build only these; whoever finds all built commits")
    later = parser.add_argument_group("generations: an earlier set stays as it is, a new one holds its tars and more")
    later.add_argument(
        "--retry", action="append", default=[], metavar="REASON", help="try rejects again, such as timeout; or: all"
    )
    later.add_argument("--remove", default="", metavar="FILE", help="without these: a key, URL, path or sha256 a line")
    later.add_argument("--fresh", action="store_true", help="from scratch, though an earlier set could grow")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it would cost and give, judged by a few rows"
    )
    parser.add_argument(
        "--sample", type=_positive, metavar="N", help="rows that --dry-run looks at (default: half a second)"
    )


def _span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of shards; expected for example 0-99")
    return int(first), int(last or first)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_argument_group("what is made")
    asked.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the videos should not show")
    asked.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="of an image-to-video model: what the videos show; once for all prompts, or once for each",
    )  # fmt: skip
    asked.add_argument("--frames", type=int, metavar="N")
    asked.add_argument("--size", type=_size, metavar="WxH", help="pixels, for example 512x320")
    asked.add_argument("--fps", type=int, metavar="N", help="told to the network: fewer means larger motion")
    asked.add_argument(
        "--seed", type=int, default=123, help="of the first prompt, the next has the next (default: 123)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--solver", choices=["ddim", "dpm++"])
    how.add_argument("--steps", type=int, metavar="N", help="default: 50")
    how.add_argument("--guidance", type=float, metavar="G", help="strength of the prompt (default: 12; 1: none)")
    how.add_argument(
        "--guidance-rescale", type=float, nargs="?", const=0.7, metavar="PHI",
        help="0 to 1, less contrast at high guidance (default: 0; without a number 0.7)",
    )  # fmt: skip
    how.add_argument("--eta", type=float, help="of ddim: 0 no fresh noise, 1 as much as there can be (default: 1)")
    how.add_argument("--batched-guidance", action="store_true", help="one network call a step: more memory")
    how.add_argument("--weights", choices=["ema", "raw"], default="ema", help="where there are both (default: ema)")
    how.add_argument("--lora", metavar="FILE", help="low-rank updates to lay over the weights")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    how.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    where = parser.add_argument_group("where to")
    where.add_argument(
        "--output", type=Path, metavar="PATH", help="a file, or a folder (default: sample.mp4, samples/)"
    )
    where.add_argument("--format", choices=["mp4", "gif", "webp"], help="default: the file's ending, else mp4")
    where.add_argument("--play-fps", type=int, default=10, metavar="N", help="written into the files (default: 10)")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    given = parser.add_argument_group("videos that are there already, by whatever model, instead of a checkpoint")
    given.add_argument("--videos", type=Path, metavar="FOLDER", help="a video a prompt, called <id>.mp4")
    given.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="what they were made from: .jsonl, .txt, EvalCrafter's metadata.json",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="of EvalCrafter or VBench (default: EvalCrafter's 17); a checkpoint stands before",
    )
    what.add_argument(
        "--mode", choices=["compat", "fixed", "both"], help="as published, mended, or both (default: both)"
    )
    what.add_argument(
        "--compare", nargs="+", default=[], metavar="ROW",
        help="published rows to lay beside ours, such as VideoCrafter2, 2024, table-1, table-3, all",
    )  # fmt: skip
    what.add_argument("--references", type=Path, metavar="FOLDER", help="images that SDXL painted, for SD_Score")
    what.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs of persons, for Celebrity_ID_Score")
    what.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=PATH", help="files of weights, by the names that doctor has"
    )
    what.add_argument(
        "--allow-unmeasured", action="store_true", help="exit with 0 though metrics could not be measured"
    )


def _study_commands(commands: Any) -> None:
    text = "Ask people which of two models' videos they prefer, blind, in any browser; and say what they answered."
    parts = commands.add_parser("study", help=text, description=text).add_subparsers(metavar="COMMAND", required=True)

    def part(name: str, act: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = parts.add_parser(name, help=text, description=text)
        added.set_defaults(act=act)
        return added

    build = part("build", _study_build, "Make a folder with a page to hand out. It needs neither server nor network.")
    build.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help="videos of a model, called <id>.mp4")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help="to hand out")
    build.add_argument("--prompts", type=Path, metavar="FILE", help="what the videos show (default: their names)")
    build.add_argument(
        "--questions", nargs="+", default=[], metavar="Q", help="visual_quality, motion_quality, text_video_alignment, "
        "or id=Question?|what to look at (default: these three)",
    )  # fmt: skip
    build.add_argument(
        "--pairs", nargs="+", default=[], metavar="A:B", help="or `first` against each other one (default: all pairs)"
    )
    build.add_argument("--seed", type=int, help="of order and sides (default: 0)")
    build.add_argument("--max-prompts", type=_positive, metavar="N", help="so many, drawn by the seed (default: all)")
    build.add_argument("--trials-per-rater", type=_positive, metavar="N", help="that one rater sees (default: all)")
    build.add_argument("--repeats", type=float, metavar="SHARE", help="shown again for self-agreement (default: 0.1)")
    build.add_argument("--attention", type=int, metavar="N", help="trials with the same video twice (default: 0)")
    build.add_argument("--min-seconds", type=float, metavar="S", help="of looking before an answer (default: 2)")
    build.add_argument("--min-plays", type=int, metavar="N", help="of both videos before an answer (default: 1)")
    build.add_argument("--no-captions", action="store_true", help="do not show the prompts")
    build.add_argument("--title", help="of the page")
    build.add_argument("--key", type=Path, metavar="FILE", help="which video is whose (default: <output>-key.json)")
    build.add_argument("--force", action="store_true", help="replace another study")
    build.add_argument("--json", action="store_true", help="print the result as JSON")

    analyse = part("analyse", _study_analyse, "What the raters answered, with intervals, tests and the paper's tables.")
    analyse.add_argument("key", type=Path, help="the file that `vc2 study build` kept back")
    analyse.add_argument("answers", nargs="+", type=Path, help="files that raters sent, or folders of them")
    analyse.add_argument("--ours", metavar="NAME", help="the model that others are compared with, as in Table 2")
    analyse.add_argument("--published", choices=["table2", "table4"], help="print the paper's figures beside ours")
    analyse.add_argument("--resamples", type=_positive, default=10_000, help="of the bootstrap (default: 10000)")
    analyse.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    analyse.add_argument("--min-seconds", type=float, help="reject faster answers (default: as the study asked)")
    analyse.add_argument("--min-attention", type=float, metavar="SHARE", help="of attention trials that must be right")
    analyse.add_argument("--json", action="store_true", help="print the result as JSON")

    plan = part("plan", _study_plan, "How many prompts and raters an interval or a test needs.")
    want = plan.add_mutually_exclusive_group(required=True)
    want.add_argument("--width", type=float, metavar="POINTS", help="half of the 95 %% interval, such as 5")
    want.add_argument("--rate", type=float, metavar="SHARE", help="win rate to be told from one half, such as 0.6")
    plan.add_argument("--power", type=float, default=0.8, help="with --rate (default: 0.8)")
    plan.add_argument("--prompts", type=_positive, help="that there are")
    plan.add_argument("--raters", type=_positive, help="that there are")
    plan.add_argument("--ties", type=float, default=0.2, help="share of answers `comparable` (default: 0.2)")
    plan.add_argument("--correlation", type=float, default=0.3, help="of answers to one prompt (default: 0.3)")
    plan.add_argument("--json", action="store_true", help="print the result as JSON")


def _progress(options: argparse.Namespace) -> "AbstractContextManager[Progress]":
    from vc2 import progress

    plain: dict[str, Progress] = {
        "lines": progress.line_progress(),
        "json": progress.json_progress,
        "none": progress.silent,
    }
    return progress.rich_progress() if options.progress == "auto" else nullcontext(plain[options.progress])


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected width x height, for example 512x320")
    return int(width), int(height)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("expected a number from 0 up")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number from 1 up")
    return number


def _row_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--row", default="", metavar="ROW",
        help="a row of the paper's Table 3 laid over the recipe, such as F-Temp-LoRA (docs/strategies.md); default: "
        "the recipe's own, F-Spa-DIR",
    )  # fmt: skip


def _training_estimate_options(parser: argparse.ArgumentParser) -> None:
    dry = parser.add_argument_group("what it would need and cost, on stated hardware; needs no GPU, shards or weights")
    dry.add_argument(
        "--dry-run", action="store_true", help="count parameters, memory, operations, hours; train nothing"
    )
    _price_options(dry)
    dry.add_argument("--encoded", action="store_true", help="samples come encoded: no encoding on the fly")


def _price_options(group: Any) -> None:
    group.add_argument("--hardware", metavar="NAME", help="such as a100-80 (the default), h100-80, rtx4090-24")
    group.add_argument("--price", type=_price, metavar="USD", help="of a GPU and hour (default: an assumption)")
    group.add_argument("--mfu", type=_share, metavar="SHARE", help="of the GPU's peak that is used (default: 0.28)")


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price; expected a number from 0 up")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected a number above 0, at most 1")
    return value


def _stage_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--start-at", metavar="STAGE", help="stages before this one must be done")


# ---- the DAG ----


def _recipe(
    options: argparse.Namespace, prefix: str = "", *, prompts: bool = True, bind: bool = True
) -> "tuple[PipelineConfig, Path]":
    """The recipe and the scratch folder. Without `prompts` it has none; without `bind` they need not be there."""
    from vc2.config import parse_settings
    from vc2.pipeline import recipes

    work = (options.work or recipes.DEFAULT_WORK).absolute()
    spared = [] if prompts else ["evaluation.prompts_file="]
    lines = [f"{prefix}{line.removeprefix(prefix)}" for line in options.set]  # `full.x` and `x` for `vc2 train full`
    settings = parse_settings([*lines, *spared])
    return recipes.resolve(options.recipe, settings, work=work, table3=getattr(options, "row", ""), bind=bind), work


def _store(options: argparse.Namespace, work: Path) -> "Store":
    from vc2.storage import open_store

    store = open_store(_store_uri(options, work))
    store.check()
    return store


def _store_uri(options: argparse.Namespace, work: Path) -> str:
    from vc2.pipeline import recipes

    default = str(work / "store") if options.work and not os.environ.get("VC2_STORE") else recipes.default_store()
    return options.store or default


def _opened(options: argparse.Namespace, prefix: str = "") -> "tuple[PipelineConfig, Store, Path]":
    config, work = _recipe(options, prefix)
    return config, _store(options, work), work


def _repeat(
    options: argparse.Namespace, config: "PipelineConfig", store: "Store", stage: str | None, last: str | None
) -> int:
    from vc2.pipeline.driver import next_repeat

    return next_repeat(config, store, stage, last) if options.force else options.repeat


def _end_of_row(options: argparse.Namespace, stage: str | None) -> str | None:
    """The stage to end with, where a row of Table 3 may end earlier than the DAG.

    Raises:
        ConfigError: If `stage` comes after the row's last one.
    """
    from vc2.pipeline.driver import STAGES
    from vc2.pipeline.table3 import last_stage, named_row

    last = last_stage(named_row(options.row)) if options.row else None
    if last and stage in STAGES and STAGES.index(stage) > STAGES.index(last):
        raise ConfigError(f"row {options.row} ends with {last}: it has no {stage}; choose a row that tunes it")
    return stage or last


def _run(options: argparse.Namespace) -> None:
    from vc2.pipeline import driver, preview, recipes, stages
    from vc2.ray_session import keeping_ray

    options.stop_after = _end_of_row(options, options.stop_after)
    if options.shards or options.checkpoint:  # a wrong URI is said at once
        place = _store(options, (options.work or recipes.DEFAULT_WORK).absolute())
        driver.given_artifacts(place, options.shards, options.checkpoint)
    try:
        config, store, work = _opened(options)
        repeat = _repeat(options, config, store, options.start_at, options.stop_after)
        given = driver.given_artifacts(store, options.shards, options.checkpoint)
        planned = driver.plan(config, store, repeat=repeat, start_at=options.start_at, given=given)
    except (ConfigError, SourceError):
        _check_before_run(options)  # tells all that is missing, not the first thing alone
        raise
    asked = driver.asked_of(planned, options.start_at, options.stop_after)
    print("\n".join(preview.short_lines(preview.previewed(asked, config, store))), file=sys.stderr)
    _check_before_run(options, asked)
    span = {"start_at": options.start_at, "stop_after": options.stop_after}
    with _progress(options) as progress, keeping_ray() as ray:

        def run_stage(planned: "PlannedStage", inputs: "Mapping[str, Artifact]") -> "Artifact":
            if not planned.name.startswith("shard/"):
                ray.close()  # nothing else needs it
            return stages.execute(planned, config, store, work, inputs=inputs, progress=progress)

        made = driver.drive(config, store, run_stage, repeat=repeat, given=given, **span)
    _say_artifact(options, store, made)


def _compare(options: argparse.Namespace) -> None:
    from vc2.artifacts import load_manifest
    from vc2.config import parse_settings
    from vc2.pipeline import compare, recipes, stages
    from vc2.progress import counted
    from vc2.ray_session import keeping_ray

    work = (options.work or recipes.DEFAULT_WORK).absolute()
    rows = compare.chosen_rows(_listed(options.rows))
    try:
        seeds = [int(seed) for seed in _listed(options.seeds)]
    except ValueError:
        raise ConfigError(f"--seeds {options.seeds}: expected numbers, for example 0,1,2") from None
    asked = compare.members(options.recipe, parse_settings(options.set), rows, seeds, work)
    store = _store(options, work)
    if options.dry_run:
        found = compare.to_do(asked, store)
        if options.json:
            print(json.dumps({name: {"stage": stage, "members": of} for name, (stage, of) in found.items()}, indent=1))
            return
        for name, (stage, of) in found.items():
            print(f"{stage:18} {name[:12]}  {', '.join(of[:4])}{f' and {len(of) - 4} more' if len(of) > 4 else ''}")
        print(f"{counted(len(asked), 'member')}, {counted(len(found), 'stage')} to do; then samples and judges")
        return
    with _progress(options) as progress, keeping_ray() as ray:

        def run(member: "compare.Member", planned: "PlannedStage", inputs: "Mapping[str, Artifact]") -> "Artifact":
            if not planned.name.startswith("shard/"):
                ray.close()  # nothing else needs it
            return stages.execute(planned, member.config, store, work, inputs=inputs, progress=progress)

        made = compare.compare(asked, store, work, run, progress=progress)
    if options.json:
        print(store.read(load_manifest(store, made.prefix).file("table.json").key).decode(), end="")
        return
    print(store.read(load_manifest(store, made.prefix).file("table.md").key).decode())
    print(compare.page_at(made))


def _listed(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _plan(options: argparse.Namespace) -> None:
    from vc2.pipeline import driver, preview
    from vc2.train.estimate import DEFAULT_HARDWARE

    options.stop_after = _end_of_row(options, options.stop_after)
    try:
        config, work = _recipe(options)
    except ConfigError:
        config, work = _recipe(options, bind=False)  # prompts may be wanting, and then that is what the plan says
    store = _store(options, work)
    given = driver.given_artifacts(store, options.shards, options.checkpoint)
    repeat = _repeat(options, config, store, options.start_at, options.stop_after)
    planned = driver.plan(config, store, repeat=repeat, start_at=options.start_at, given=given, tolerant=True)
    planned = driver.asked_of(planned, options.start_at, options.stop_after)
    terms = {"hardware": options.hardware or DEFAULT_HARDWARE, "price": options.price, "mfu": options.mfu}
    rows = preview.previewed(planned, config, store, against=options.against, **terms)
    total = preview.total(rows, **terms)
    if options.json:
        stages = [
            row.model_dump(mode="json") | {"uri": f"{store.uri}/{stage.prefix}", "inputs": dict(stage.inputs)}
            for row, stage in zip(rows, planned, strict=True)
        ]
        whole = {"store": store.uri, "stages": stages, "total": total.model_dump(mode="json")}
        print(json.dumps(whole | {"config": config.model_dump(mode="json")}, indent=1))
        return
    print("\n".join(preview.lines_of(rows, total)))


def _one_stage(options: argparse.Namespace, name: str, config: "PipelineConfig", store: "Store", work: Path) -> None:
    made = _made(options, name, config, store, work)
    if os.environ.get("RANK", "0") == "0":  # of the ranks that make the same call (launcher=env) one says so
        _say_artifact(options, store, made)


def _made(options: argparse.Namespace, name: str, config: "PipelineConfig", store: "Store", work: Path) -> "Artifact":
    from vc2.pipeline import driver, stages

    repeat = _repeat(options, config, store, name, name)
    shards, checkpoint = getattr(options, "shards", []), getattr(options, "checkpoint", "")
    given = driver.given_artifacts(store, shards, checkpoint, stage=name)
    with _progress(options) as progress:
        return stages.run_stage(name, config, store, work, given=given, repeat=repeat, progress=progress)


def _shard(options: argparse.Namespace) -> None:
    from vc2.pipeline import shard, stages
    from vc2.pipeline.driver import FIELDS
    from vc2.progress import counted

    request = shard.ShardRequest(
        retry=tuple(reason.strip() for text in options.retry for reason in text.split(",") if reason.strip()),
        remove=options.remove,
        fresh=options.fresh,
        only=options.shards,
    )
    if request.retry and request.remove:
        raise ConfigError("--retry and --remove make a generation each; give one after the other")
    if options.dry_run and (request.retry or request.remove):
        raise ConfigError("--dry-run judges a set made from scratch; leave out --retry and --remove")
    if options.limit is not None:
        options.set.append(f"limit={options.limit}")
    name = f"shard/{options.source}"
    if options.sample is not None and not options.dry_run:
        raise ConfigError("--sample is for --dry-run; --limit takes the first rows in earnest")
    if name in FIELDS:
        own = {"--as": options.kind, "--media": options.media, "--table": options.table, "--name": options.name}
        if given := [option for option, value in own.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(given)}: {options.source} is the source of the recipe; write ./{options.source} for a "
                "folder of that name, or --set source.table=... for another place"
            )
        config, work = _recipe(options, prefix=f"{FIELDS[name]}.", prompts=False)
        if options.dry_run:
            with _progress(options) as progress:
                with shard.ready_source(config, getattr(config, FIELDS[name]), work, progress) as stage:
                    _estimate(options, stage, work)
            return
        store = _store(options, work)
        request = request.evolve(repeat=_repeat(options, config, store, name, name))
        with _progress(options) as progress:
            made = stages.run_shards(name, config, store, work, request, progress=progress, note=_note)
        place = options.source
    else:
        stage, work = _own_stage(options)
        if options.dry_run:
            _estimate(options, stage, work)
            return
        store = _store(options, work)
        form = stage.form
        frames = counted(form.num_frames, "frame")
        _note(f"form of recipe {options.recipe}: {frames} of {form.width} x {form.height} pixels")
        name = f"shard/{stage.source.name}"
        repeat = shard.unused_repeat(name, stage, store) if options.force else options.repeat
        with _progress(options) as progress:
            made = shard.make_shards(
                name, stage, store, work, request.evolve(repeat=repeat), progress=progress, note=_note
            )
        place = "webvid" if stage.source.media == "video" else "jdb"
    if made is None:
        _note("the shards asked for are built; the set is committed when all are")
        return
    _say_artifact(options, store, made)
    if not options.json:
        print(f"to look at it   vc2 show {shlex.quote(made.uri)} --sheet sheet.html")
        _say_training(options, place, made)


def _own_stage(options: argparse.Namespace) -> "tuple[ShardStage, Path]":
    """A source of the user's own, in the form of the recipe's videos or images."""
    from vc2.config import merge, parse_settings
    from vc2.pipeline.shard import own_source

    settings, options.set = parse_settings(options.set), []
    source = own_source(options.source, kind=options.kind, media=options.media, table=options.table, name=options.name)
    config, work = _recipe(options, prompts=False)
    like = config.webvid if source.media == "video" else config.jdb
    return merge(like.evolve(source=source), settings), work


def _estimate(options: argparse.Namespace, stage: "ShardStage", work: Path) -> None:
    _spare_pandas()
    from vc2.data.estimate import estimate

    found = estimate(stage, work, sample=options.sample)
    if options.json:
        print(json.dumps(found.model_dump(mode="json"), indent=1))
    else:
        print("\n".join(found.lines()))


class _NoPandas:
    """An import hook by which there is no pandas."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _spare_pandas() -> None:
    """pyarrow imports pandas, a second's work, to see whether rows that it is given are pandas' own. In a process that
    ends after a quick answer none are, so it is told that there is no pandas; Ray Data would need it."""
    if {"ray", "pandas"} & set(sys.modules):
        return
    import pyarrow

    sys.meta_path.insert(0, _NoPandas)  # type: ignore[arg-type]
    try:
        pyarrow.array([0])  # it asks once
    finally:
        sys.meta_path.remove(_NoPandas)  # type: ignore[arg-type]


def _index(options: argparse.Namespace) -> None:
    from vc2.data.foreign import adopt
    from vc2.pipeline.shard import name_of

    config, work = _recipe(options, prompts=False)
    store = _store(options, work)
    form = (config.webvid if options.media == "video" else config.jdb).form
    with _progress(options) as progress:
        made = adopt(
            options.tars,
            media=options.media,
            form=form,
            name=options.name or name_of(options.tars),
            store=store,
            work=work,
            license=options.license,
            progress=progress,
        )
    _say_artifact(options, store, made)
    if not options.json:
        _say_training(options, "webvid" if options.media == "video" else "jdb", made)


def _train(options: argparse.Namespace) -> None:
    _end_of_row(options, f"train/{options.stage}")
    asked = {"--hardware": options.hardware, "--price": options.price, "--mfu": options.mfu}
    if options.dry_run:
        _estimate_training(options)
        return
    if given := [name for name, value in asked.items() if value is not None] + ["--encoded"] * options.encoded:
        raise ConfigError(f"{', '.join(given)}: for --dry-run; training takes the hardware that is there")
    config, store, work = _opened(options, prefix=f"{options.stage}.")
    _one_stage(options, f"train/{options.stage}", config, store, work)


def _estimate_training(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # imported by others on the way, it would talk on stdout

    from vc2.train.estimate import DEFAULT_HARDWARE, MFU, estimate, lines_of
    from vc2.train.fit import stage_forms

    config, _ = _recipe(options, prefix=f"{options.stage}.", prompts=False)
    stage, forms = config.spatial, stage_forms(image=config.jdb.form)
    if options.stage == "full":
        stage, forms = config.full, stage_forms(video=config.webvid.form, image=config.laion_coco.form)
    found = estimate(
        stage,
        forms,
        hardware=options.hardware or DEFAULT_HARDWARE,
        mfu=options.mfu or MFU,
        price=options.price,
        encoded=options.encoded,
    )
    if options.json:
        more = {"gpu_hours": found.gpu_hours, "usd": found.usd}
        print(json.dumps(found.model_dump(mode="json") | more, indent=1))
        return
    print("\n".join(lines_of(found)))


def _precompute(options: argparse.Namespace) -> None:
    from vc2.artifacts import Checkpoint, ShardSet
    from vc2.pipeline import driver
    from vc2.train.precompute import precompute

    config, store, work = _opened(options, prefix=f"{options.stage}.")
    name = f"train/{options.stage}"
    given = driver.given_artifacts(store, options.shards, options.checkpoint, stage=name)
    planned = {stage.name: stage for stage in driver.plan(config, store, start_at=name, given=given)}
    start_from = planned[planned[name].inputs["start_from"]].artifact if "start_from" in planned[name].inputs else None
    made: dict[str, str] = {}
    with _progress(options) as progress:
        for source in planned[name].inputs.values():
            if not source.startswith("shard/"):
                continue
            shards = planned[source].artifact
            if not isinstance(shards, ShardSet):
                raise ConfigError(f"{name} needs {source}, which is not done; make it first, or give --shards URI")
            latents = precompute(
                getattr(config, options.stage),
                store,
                work,
                shards,
                start_from=start_from if isinstance(start_from, Checkpoint) else None,
                dtype=options.dtype,
                progress=progress,
            )
            made[source.removeprefix("shard/")] = latents.uri
    if options.json:
        print(json.dumps(made, indent=1))
        return
    words = ["vc2", "train", options.stage, "--recipe", options.recipe]
    words += [word for place, uri in made.items() for word in ("--shards", f"{place}={uri}")]
    where = {"--store": options.store, "--work": options.work}
    words += [word for name, value in where.items() if value for word in (name, str(value))]
    print(f"to train on them  {shlex.join(words)}")


def _evaluate(options: argparse.Namespace) -> int:
    """3 if what was asked for was measured but for some of it."""
    from vc2.artifacts import Report
    from vc2.pipeline.scores import lacking, score_lines, scores_of

    asked = {
        "metrics": options.metrics,
        "mode": options.mode,
        "compare": options.compare or None,
        "references": options.references and str(options.references.absolute()),
        "photos": options.photos and str(options.photos.absolute()),
        "prompts_file": options.prompts and str(options.prompts.absolute()),
        "unmeasured": "allow" if options.allow_unmeasured else None,
    }
    if options.weights:
        asked["files"] = _named_paths(options.weights)
    options.set += [f"evaluation.{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]
    if options.videos is not None and options.recipe:
        raise ConfigError("--recipe is for a checkpoint; --videos takes the settings that --set and the options name")
    options.recipe = options.recipe or "miniature"
    if options.videos is not None:
        wanted, store, made = _evaluate_videos(options)
    else:
        config, store, work = _opened(options, prefix="evaluation.")
        wanted, made = config.evaluation, _made(options, "evaluate/evalcrafter", config, store, work)
    assert isinstance(made, Report)
    benchmark = scores_of(store, made)
    if os.environ.get("RANK", "0") != "0":  # of the ranks that make the same call (launcher=env) one says so
        pass
    elif options.json:
        print(json.dumps({"report": made.model_dump(mode="json"), "benchmark": benchmark}, indent=1))
    else:
        print("\n".join(score_lines(benchmark, wanted.compare)))
        _say_artifact(options, store, made)
    is_whole = not lacking(benchmark, by_default=not wanted.metrics)
    return 0 if is_whole or wanted.unmeasured == "allow" else 3


def _named_paths(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--weights {text!r}: expected NAME=PATH, such as dover=DOVER.pth")
        found[name] = str(Path(path).absolute())
    return found


def _evaluate_videos(options: argparse.Namespace) -> "tuple[EvaluateStage, Store, Artifact]":
    from vc2.config import merge, parse_settings
    from vc2.eval.config import EvaluateStage
    from vc2.eval.leaderboard import rows_named
    from vc2.pipeline.recipes import DEFAULT_WORK
    from vc2.pipeline.scores import evaluate_folder

    if options.checkpoint:
        raise ConfigError("both a checkpoint and --videos are given; --videos scores what is there already")
    if options.prompts is None and not any(
        line.removeprefix("evaluation.").startswith("prompts") for line in options.set
    ):
        raise ConfigError("--videos needs --prompts: what the videos were made from, with ids that are their names")
    work = (options.work or DEFAULT_WORK).absolute()
    lines = [f"evaluation.{line.removeprefix('evaluation.')}" for line in options.set]
    wanted = merge(EvaluateStage(), parse_settings(lines)["evaluation"]).with_prompts().with_metrics()
    rows_named(wanted.compare or ["all"])
    store = _store(options, work)
    with _progress(options) as progress:
        made = evaluate_folder(
            options.videos, wanted, store, work, progress=progress, repeat=options.repeat, force=options.force
        )
    return wanted, store, made


def _refit(options: argparse.Namespace) -> None:
    from vc2.artifacts import Scorecard, load_manifest
    from vc2.eval.refit import read_feedback, read_scores, refit

    feedback, scores = read_feedback(options.feedback), {}
    for given in options.scores:
        model, equals, uri = given.partition("=")
        if not equals:
            raise ConfigError(f"--scores {given!r}: expected MODEL=URI, with the model's name as in the feedback")
        store, card = _artifact(uri)
        if card.kind == "report":
            store, card = _artifact(load_manifest(store, card.prefix).inputs["scores"].uri)
        if not isinstance(card, Scorecard):
            raise ConfigError(f"{uri} is a {card.kind}; expected a scorecard, or a report on one")
        scores[model] = read_scores(store, card, options.mode)
    fitted = refit(feedback, scores, mode=options.mode, seed=options.seed, held_out=options.held_out)
    text = json.dumps(fitted.as_json(), indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else "\n".join(fitted.text_lines()))


def _study_build(options: argparse.Namespace) -> None:
    from vc2.config import merge
    from vc2.eval.study.build import build
    from vc2.eval.study.config import StudyConfig, parse_folders, parse_pairs, parse_questions
    from vc2.progress import rich_progress

    asked = {
        name: getattr(options, name)
        for name in (
            "title",
            "max_prompts",
            "trials_per_rater",
            "repeats",
            "attention",
            "min_seconds",
            "min_plays",
            "seed",
        )
    }
    asked |= {"questions": parse_questions(options.questions), "pairs": parse_pairs(options.pairs)}
    asked |= {"captions": not options.no_captions}
    config = merge(StudyConfig(), {name: value for name, value in asked.items() if value is not None})
    with rich_progress() as progress:
        made = build(
            parse_folders(options.folders),
            options.output,
            config,
            prompts=options.prompts,
            key=options.key,
            force=options.force,
            progress=progress,
        )
    if options.json:
        print(json.dumps(made.as_dict(), indent=1))
        return
    print(f"{made.folder}/index.html")
    print(
        f"{made.prompts} prompts, {', '.join(made.models)}: {made.trials} trials a rater, about {made.minutes:.0f} min"
    )
    for left in made.left_out[:10]:
        _note(f"left out {left.prompt} of {left.model}: {left.reason}")
    if len(made.left_out) > 10:
        _note(f"and {len(made.left_out) - 10} more")
    for warning in made.warnings:
        _note(warning)
    print(f"hand out the folder and keep {made.key}, which says whose videos they are; then")
    print(f"  {shlex.join(['vc2', 'study', 'analyse', str(made.key), 'ANSWERS...'])}")


def _study_analyse(options: argparse.Namespace) -> None:
    from vc2.eval.leaderboard import read_table
    from vc2.eval.study.analyse import analyse
    from vc2.eval.study.tables import render_markdown

    result = analyse(
        options.key,
        options.answers,
        resamples=options.resamples,
        seed=options.seed,
        min_seconds=options.min_seconds,
        min_attention=options.min_attention,
    )
    published = read_table(f"videocrafter2_paper_{options.published}") if options.published else ()
    text = render_markdown(result, ours=options.ours, published=published)
    print(json.dumps(result.as_dict(), indent=1) if options.json else text.rstrip())


def _study_plan(options: argparse.Namespace) -> None:
    from vc2.eval.study.planner import plan_raters

    plan = plan_raters(
        width=None if options.width is None else options.width / 100,
        rate=options.rate,
        power=options.power,
        prompts=options.prompts,
        raters=options.raters,
        ties=options.ties,
        correlation=options.correlation,
    )
    print(json.dumps(plan.as_dict(), indent=1) if options.json else plan.sentence())


def _references(options: argparse.Namespace) -> None:
    from vc2.eval.prompts import load_prompts
    from vc2.pipeline.scores import paint_references
    from vc2.progress import rich_progress

    prompts = load_prompts(options.prompts)
    with rich_progress() as progress:
        made = paint_references(
            prompts, options.output, sdxl=options.sdxl, seed=options.seed, device=options.device, progress=progress
        )
    if options.json:
        print(json.dumps(made, indent=1))
    else:
        print(f"{made['images']} images of {made['prompts']} prompts in {options.output}, digest {made['digest'][:16]}")
        print(f"to score with them  vc2 evaluate ... --references {shlex.quote(str(options.output))}")


def _sample(options: argparse.Namespace) -> None:
    from vc2.config import merge
    from vc2.pipeline import sample
    from vc2.progress import rich_progress

    width, height = options.size or (None, None)
    sampler = {
        "solver": options.solver,
        "num_steps": options.steps,
        "guidance_scale": options.guidance,
        "guidance_rescale": options.guidance_rescale,
        "eta": options.eta,
        "batched_guidance": options.batched_guidance,
    }
    asked = {
        "prompts": options.prompts,
        "negative_prompt": options.negative_prompt,
        "images": options.image,
        "seed": options.seed,
        "frames": options.frames,
        "width": width,
        "height": height,
        "fps": options.fps,
        "sampler": {name: value for name, value in sampler.items() if value is not None},
        "precision": options.precision,
        "device": options.device,
        "play_fps": options.play_fps,
    }
    request = merge(sample.SampleRequest(prompts=()), {k: v for k, v in asked.items() if v is not None})
    sample.check_prompts(request)
    files, container = sample.output_files(options.output, options.format, len(request.prompts))
    with rich_progress() as progress:
        progress("loading the model", 0, 1)
        loaded = _loaded(options)
        progress("loading the model", 1, 1)
        made = sample.sample_videos(loaded, request, files, container, progress=progress, warn=_note)
    if options.json:
        print(json.dumps(made, indent=1))
    else:
        print("\n".join(video["video"] for video in made))


def _loaded(options: argparse.Namespace) -> "LoadedModel":
    from vc2.pipeline import sample
    from vc2.pipeline.imported import is_checkpoint_uri
    from vc2.pipeline.recipes import DEFAULT_WORK

    where = options.checkpoint
    if is_checkpoint_uri(where):
        store, artifact = _artifact(where)
        cache = (options.work or DEFAULT_WORK).absolute() / "cache" / "weights"
        return sample.load_artifact(store, artifact, weights=options.weights, cache=cache, lora=options.lora or "")
    return sample.load_files(Path(where), weights=options.weights, lora=options.lora or "")


def _note(text: str) -> None:
    print(f"vc2: note: {text}", file=sys.stderr)


# ---- artifacts ----


def _artifact(uri: str) -> "tuple[Store, Artifact]":
    from vc2.artifacts import load_manifest
    from vc2.storage import open_store

    place = uri.removesuffix("/").removesuffix("/manifest.json")
    for kind in ARTIFACTS:
        root, found, rest = place.rpartition(f"/{kind}/")
        if found:
            store = open_store(root)
            prefix = f"{kind}/{rest}"
            return store, load_manifest(store, prefix).reference(store, prefix)
    raise StoreError(
        f"{uri} is no URI of an artifact; expected <store>/shards/..., runs/..., samples/..., scores/... or reports/..."
    )


def _show(options: argparse.Namespace) -> None:
    from vc2.artifacts import load_manifest
    from vc2.data import audit

    if Path(options.uri).is_file() and Path(options.uri).suffix.lower() in (".mp4", ".gif", ".webp"):
        _show_video(Path(options.uri), as_json=options.json)
        return
    uri, _, key = options.uri.partition("#")
    in_place = any((Path(uri) / kind).is_dir() for kind in ARTIFACTS)
    if in_place or ("://" in uri and not any(f"/{kind}/" in uri for kind in ARTIFACTS)):
        _show_store(uri, as_json=options.json)
        return
    store, artifact = _artifact(uri)
    manifest = load_manifest(store, artifact.prefix)
    if key:
        print(json.dumps(audit.explain(store, manifest, key), indent=1, default=str))
        return
    if options.lineage:
        _write_lineage(options.lineage, store, artifact, as_json=options.json)
        return
    if options.shards or options.sheet:
        _show_shards(options, store, manifest)
        return
    if options.json:
        print(json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True))
        return
    print("\n".join(described(manifest)))


def _show_store(uri: str, *, as_json: bool) -> None:
    """The newest artifacts of each kind, as the catalogue has them."""
    from vc2.artifacts import newest_notes
    from vc2.pipeline.lineage import brief
    from vc2.storage import join_uri, open_store

    store = open_store(uri)
    noted = (entry.key.removeprefix("catalog/").rpartition("/")[0] for entry in store.list("catalog/"))
    folders = list(dict.fromkeys(noted))
    folders += [kind for kind in ARTIFACTS if not any(name.split("/")[0] == kind for name in folders)]
    found = {folder: notes for folder in folders if (notes := newest_notes(store, folder, NEWEST))}
    if not found:
        raise StoreError(f"{uri}: no artifacts; expected the URI of a store with some, or of an artifact in it")
    if as_json:
        told = {folder: [note.model_dump(mode="json") for note in notes] for folder, notes in found.items()}
        print(json.dumps({"store": store.uri, "newest": told}, indent=1))
        return
    for folder, notes in found.items():
        print(f"{folder}, the newest:")
        for note in {note.prefix: note for note in notes}.values():
            made, what = note.manifest.created_at[:16].replace("T", " "), brief(note.manifest)
            what = f"{note.manifest.stage}, {what}" if note.manifest.kind == "report" else what
            print(f"  {made}  {what:32}  {join_uri(store.uri, note.prefix)}")


def _write_lineage(path: Path, store: "Store", artifact: "Artifact", *, as_json: bool) -> None:
    from vc2.pipeline import lineage

    found = lineage.graph(store, artifact)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{found.model_dump_json(indent=1)}\n" if as_json else lineage.page(found), encoding="utf-8")
    print(path.absolute())
    for node in found.nodes:
        for trouble in node.troubles:
            print(f"vc2: {node.name}: {trouble}", file=sys.stderr)


def _show_shards(options: argparse.Namespace, store: "Store", manifest: "Manifest") -> None:
    if manifest.kind != "shard_set":
        raise ConfigError(f"{options.uri} is a {manifest.kind}; --shards and --sheet are for shard sets")
    if options.sheet:
        from vc2.data.sheet import contact_sheet

        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        options.sheet.write_text(contact_sheet(store, manifest), encoding="utf-8")
        print(options.sheet.absolute())
    if options.shards:
        from vc2.data.audit import shard_table
        from vc2.progress import size_text

        lines = shard_table(store, manifest)
        if options.json:
            print(json.dumps(lines, indent=1))
            return
        print(f"{'shard':>8} {'generation':>10} {'samples':>8} {'rejected':>8} {'size':>8}  tar")
        for line in lines:
            line["rejected"] = "?" if line["rejected"] is None else line["rejected"]
            line["size"] = size_text(line["bytes"])
            print("{shard:>8} {generation:>10} {samples:>8} {rejected:>8} {size:>8}  {tar}".format(**line))


def _show_video(path: Path, *, as_json: bool) -> None:
    from vc2.pipeline.sample import read_settings

    settings = read_settings(path)
    if as_json:
        print(json.dumps(settings, indent=1))
        return
    for name, value in settings.items():
        print(f"{name:16} {value}")


def _verify(options: argparse.Namespace) -> int:
    from vc2.artifacts import load_manifest, verify
    from vc2.data.audit import check_samples

    store, first = _artifact(options.uri)
    wrong: dict[str, list[str]] = {}
    todo, seen = [first], set()
    while todo:
        artifact = todo.pop()
        if artifact.prefix in seen:
            continue
        seen.add(artifact.prefix)
        manifest = load_manifest(store, artifact.prefix)
        wrong[artifact.prefix] = problems = list(verify(store, artifact.prefix))
        if manifest.kind == "shard_set":
            tars = {name for name in (problem.partition(":")[0] for problem in problems) if name.endswith(".tar")}
            if tars or options.samples:
                problems += check_samples(store, manifest, None if options.samples else tars)
        todo += manifest.inputs.values()
    if options.json:
        print(json.dumps(wrong, indent=1))
    else:
        for prefix, problems in wrong.items():
            print(f"{'ok   ' if not problems else 'WRONG'} {prefix}")
            for problem in problems:
                print(f"      {problem}")
    return int(any(wrong.values()))


def _checkpoint(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # imported by others on the way, it would talk on stdout

    from vc2.pipeline.gc import run_at
    from vc2.pipeline.recipes import DEFAULT_WORK
    from vc2.train.export import export_step

    run, state = run_at(options.run)
    if state is not None and options.step not in (None, state.step):
        raise ConfigError(f"--step {options.step}, but the URI is of step {state.step}; leave one out")
    step = state.step if state is not None else options.step
    _say_artifact(options, run.store, export_step(run, (options.work or DEFAULT_WORK).absolute(), step))


def _gc(options: argparse.Namespace) -> None:
    from vc2.pipeline import gc
    from vc2.pipeline.recipes import DEFAULT_WORK
    from vc2.progress import size_text

    if options.pin or options.unpin:
        for uri, keep in [*((uri, True) for uri in options.pin), *((uri, False) for uri in options.unpin)]:
            ref = gc.pin(uri, keep=keep)
            print(f"{'pinned' if keep else 'unpinned'}  step {ref.step} of attempt {ref.attempt}")
        return
    store = _store(options, (options.work or DEFAULT_WORK).absolute())
    terms = {"keep": options.keep, "grace_hours": options.grace}
    found = gc.collect_garbage(store, **terms) if options.yes else gc.find_garbage(store, **terms)
    if not options.json:
        for name in gc.CLASSES:
            print(f"{name:11} {len(found.classes[name]):>8} {size_text(found.sizes[name]):>10}")
            for key in found.classes[name] if options.dry_run else ():
                print(f"            {key}")
        for run in found.alive:
            print(f"left alone  {run}: somebody works on it")
    is_asked = not (options.yes or options.dry_run or options.json or found.is_empty)
    is_deleted = options.yes
    if is_asked and _agreed("delete it?"):
        found, is_deleted = gc.collect_garbage(store, **terms, shown=found), True
    if options.json:
        print(json.dumps(found.model_dump(mode="json") | {"deleted": is_deleted}, indent=1))
    elif found.is_empty:
        print("nothing to delete")
    elif is_deleted:
        print("deleted")
    else:
        print("nothing was deleted" + ("" if options.dry_run else "; --yes deletes it, --dry-run lists it"))


def _agreed(question: str) -> bool:
    """Whether somebody at a terminal says yes; without one nobody does."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


# ---- weights ----


def _convert(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # imported by others on the way, it would talk on stdout

    from vc2.pipeline.imported import convert
    from vc2.pipeline.recipes import DEFAULT_WORK

    done = convert(
        options.source,
        options.destination,
        options.to,
        (options.work or DEFAULT_WORK).absolute(),
        fps=options.fps,
        dtype=options.dtype,
        weights=options.weights,
        hyper_parameters=options.hyper_parameters,
        force=options.force,
    )
    if done.caution:
        _note(done.caution)
    if options.json:
        print(json.dumps(asdict(done), indent=1))
        return
    groups = ", ".join(f"{count:,} {group}" for group, count in done.parameters.items() if group != "total")
    print(f"read   {done.source}: {done.form}, {done.recognised_as}")
    print(f"       {done.parameters['total']:,} parameters ({groups}); with {', '.join(done.parts) or 'nothing else'}")
    print(f"wrote  {done.destination} ({done.to})")


def _mirror(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vc2.pretrained import mirror

    steps = []
    for step in mirror(options.destination, tuple(options.only), source=options.source, verify=options.verify):
        steps.append(step)
        if not options.json:
            print(f"{step.outcome:14} {step.name:22} {step.words}", flush=True)
    if options.json:
        print(json.dumps([asdict(step) for step in steps], indent=1))
    return int(any(step.outcome in ("missing", "wrong") for step in steps))


def _doctor(options: argparse.Namespace) -> int:
    if options.recipe is not None:
        return _doctor_of_recipe(options)
    return _doctor_of_machine(options)


def _doctor_of_recipe(options: argparse.Namespace) -> int:
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not options.json:
            print("\n".join(finding.lines()), flush=True)
    well = all(finding.is_well for finding in findings)
    if options.json:
        told = [finding.model_dump(mode="json") for finding in findings]
        print(json.dumps({"recipe": options.recipe, "findings": told, "well": well}, indent=1))
    elif not findings:
        print("all stages are done; nothing has to run")
    else:
        wrong = sum(not finding.is_well for finding in findings)
        print(f"{wrong} of {len(findings)} are missing; `vc2 run` would refuse" if wrong else "all is well")
    return int(not well)


def _findings(options: argparse.Namespace, stages: Sequence[str] = ()) -> "Iterator[Finding]":
    """What a run with these options needs (what some of its stages need), one finding after the other; none if nothing
    has to run."""
    from vc2.config import parse_settings
    from vc2.pipeline import preflight, recipes

    options.stop_after = _end_of_row(options, options.stop_after)
    work = (options.work or recipes.DEFAULT_WORK).absolute()
    with _progress(options) as progress:
        yield from preflight.preflight_of_recipe(
            options.recipe,
            parse_settings(options.set),
            _store_uri(options, work),
            work,
            table3=options.row,
            stages=stages,
            start_at=options.start_at,
            stop_after=options.stop_after,
            repeat=getattr(options, "repeat", 0),
            shards=options.shards,
            checkpoint=options.checkpoint,
            progress=progress,
        )


def _check_before_run(options: argparse.Namespace, planned: "Sequence[PlannedStage] | None" = None) -> None:
    """The preflight of `vc2 run`; only what is not well is told.

    Raises:
        ConfigError: If anything is not.
    """
    from vc2.pipeline import preflight

    todo = [stage.name for stage in planned or () if stage.artifact is None]
    if options.no_preflight or (planned is not None and not todo):
        return
    findings = []
    for finding in _findings(options, todo):
        findings.append(finding)
        if not finding.is_well:
            print("\n".join(finding.lines()), file=sys.stderr, flush=True)
    preflight.require(findings)


def _doctor_of_machine(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vc2.pipeline.recipes import default_store
    from vc2.pretrained import WEIGHTS, status
    from vc2.storage import open_store

    packages, machine = _packages(), _machine()
    weights = [status(name, digests=options.digests) for name in WEIGHTS]
    uri = options.store or default_store()
    try:
        open_store(uri).check()
        store = "can be written, honours conditional writes"
    except Vc2Error as error:
        store = str(error)
    damaged = any(weight.digest == "differs" for weight in weights)
    well = store.startswith("can") and "missing" not in packages.values() and not damaged
    if options.json:
        told = {weight.name: asdict(weight) for weight in weights}
        report = {"machine": machine, "packages": packages, "weights": told, "metrics": _measurable(),
                  "store": {uri: store}, "well": well}  # fmt: skip
        print(json.dumps(report, indent=1))
        return int(not well)
    print("machine")
    for name, words in machine.items():
        print(f"  {name:18} {words}")
    print("packages")
    for name, version in packages.items():
        print(f"  {name:18} {version}")
    print("foreign weights (only some recipes and scores need them)")
    for weight in weights:
        about = WEIGHTS[weight.name]
        state = {"ok": "ok", "differs": "DAMAGED", "not checked": "found", "": "missing"}[weight.digest]
        size = f"{about.about_gb:g} GB; " if about.about_gb else ""
        print(f"  {weight.name:22} {state:8} {size}{about.used_by}; licence {about.license}")
        for line in (weight.found, weight.problem if weight.found else "", weight.remedy):
            if line:
                print(f"  {'':31} {line}")
    print("metrics that an evaluation could measure here")
    for name, why in _measurable().items():
        print(f"  {name:22} {why or 'yes'}")
    print(f"store {uri}\n  {store}")
    return int(not well)


def _measurable() -> dict[str, str]:
    """Why each metric could not be measured; empty if it could."""
    from vc2.eval.config import EvaluateStage
    from vc2.eval.metrics import METRICS, MODES, modes_of

    missing = EvaluateStage(metrics=tuple(METRICS)).missing()
    told = {}
    for name, metric in METRICS.items():
        modes = {mode: missing.get(f"{name}/{mode}", "") for mode in modes_of(metric, MODES)}
        reasons = list(dict.fromkeys(modes.values()))
        words = "; ".join(f"{mode}: {why or 'yes'}" for mode, why in modes.items())
        told[name] = reasons[0] if len(reasons) == 1 else words
    return told


def _packages() -> dict[str, str]:
    from importlib import metadata

    packages = {}
    for name in ("torch", "torchvision", "ray", "prefect", "deepspeed", "decord", "av", "diffusers", "transformers",
                 "open_clip_torch", "peft", "safetensors"):  # fmt: skip
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "missing"
    return packages


def _machine() -> dict[str, str]:
    import platform
    import shutil

    import psutil
    import torch

    from vc2.pipeline.recipes import DEFAULT_WORK

    place = next(folder for folder in (DEFAULT_WORK, *DEFAULT_WORK.parents) if folder.exists())
    disk, memory = shutil.disk_usage(place), psutil.virtual_memory()
    said = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "disk": f"{disk.free / 1e9:.0f} of {disk.total / 1e9:.0f} GB free at {place}",
        "cuda": torch.version.cuda or "torch was built without it",
    }
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        said[f"device {number}"] = f"{device.name}, {device.total_memory / 1e9:.0f} GB"
    if not torch.cuda.is_available():
        said["device"] = "no GPU: recipes other than miniature need one"
    return said


# ---- telling the user ----


def _say_artifact(options: argparse.Namespace, store: "Store", artifact: "Artifact") -> None:
    from vc2.pipeline.stages import page_of

    if options.json:
        print(json.dumps(artifact.model_dump(mode="json"), indent=1))
        return
    if artifact.kind == "shard_set":
        print(f"shard set       {artifact.uri}")
        print("\n".join(_table(_accounts(artifact.counts))))
        return
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in artifact.counts.items())
    print(f"{artifact.kind.replace('_', ' ')}: {artifact.uri}{f'  ({counts})' if counts else ''}")
    if page := page_of(store, artifact):
        print(page)


def _say_training(options: argparse.Namespace, place: str, made: "Artifact") -> None:
    """The command that trains on a set in place of a source of the recipe, in the same store."""
    where = {"--store": options.store, "--work": options.work}
    words = ["vc2", "run", options.recipe, "--shards", f"{place}={made.uri}"]
    words += [word for name, value in where.items() if value for word in (name, str(value))]
    print(f"to train on it  {shlex.join(words)}")


def described(manifest: "Manifest") -> Iterator[str]:
    """An artifact for people: what it is, what is in it, where it comes from."""
    from vc2.progress import size_text

    facts = dict(manifest.facts)
    is_set = manifest.kind == "shard_set"
    if is_set:
        yield f"shard set of {facts.pop('media', 'sample')}s: {facts.pop('source', 'no name')}"
    else:
        yield f"{manifest.kind.replace('_', ' ')} made by {manifest.stage} (version {manifest.stage_version})"
    made = f"{manifest.created_at[:19].replace('T', ' ')} UTC in {manifest.seconds:.1f} s"
    lines = [("made", f"{made} by {manifest.stage} (version {manifest.stage_version})" if is_set else made)]
    lines += (
        _accounts(manifest.counts) if is_set else ((name, _brief(value)) for name, value in manifest.counts.items())
    )
    generations = facts.pop("generations", [])
    if is_set:
        reasons = sorted(facts.pop("reasons", {}).items(), key=lambda item: (-item[1], item[0]))
        lines += [("rejects" if not n else "", f"{count:,} {name}") for n, (name, count) in enumerate(reasons)]
        rates = sorted(facts.pop("fps_histogram", {}).items(), key=lambda item: int(item[0]))
        lines += [("rates", ", ".join(f"{count:,} at {fps} fps" for fps, count in rates))] if rates else []
        spent = facts.pop("seconds", {})
        steps = sorted(spent, key=["fetch", "plan", "build", *spent].index)
        lines += [("worked", ", ".join(f"{step} {spent[step]:g} s" for step in steps))] if steps else []
        facts |= {"settings": facts.pop("asked")} if "asked" in facts else {}
    lines += [(name.replace("_", " "), text) for name, value in facts.items() if (text := _brief(value))]
    lines += [("licence", f"{name}: {text}") for name, text in manifest.licenses.items()]
    lines += [("fingerprint", manifest.fingerprint), ("content digest", manifest.content_digest)]
    yield from _table(lines)
    if generations:
        yield "generations:"
        yield from _generations(generations)
    yield "made from:" if manifest.inputs else "made from raw data alone"
    for role, source in manifest.inputs.items():
        yield f"  {role}: {source.uri}"
    yield f"files ({len(manifest.files)}):"
    for entry in manifest.files[:20]:
        yield f"  {entry.name:20} {size_text(entry.size):>8}  sha256 {entry.sha256[:12]}"
    if len(manifest.files) > 20:
        yield f"  and {len(manifest.files) - 20:,} more"


def _table(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in lines:
        yield f"{name:15} {text}"


ROW_COUNTS = ("rows", "rows_with_samples", "rows_rejected", "rows_duplicate")


def _accounts(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The counts of a shard set, what matters most first."""
    from vc2.progress import counted, size_text

    left = dict(counts)
    rows, good, rejected, same, samples, shards, size = (
        left.pop(name, 0) for name in (*ROW_COUNTS, "samples", "shards", "media_bytes")
    )
    copies = counted(same, "exact duplicate")
    yield "rows", f"{rows:,} = {good:,} with samples + {rejected:,} rejected + {copies}"
    yield "samples", f"{samples:,} in {counted(shards, 'shard')}{f', {size_text(size)}' if size else ''}"
    for name, more in (
        ("near_duplicates", "samples that training leaves out"),
        ("clips_rejected", "of rows that keep others"),
        ("media_unmatched", "that no row names"),
    ):
        if number := left.pop(name, 0):
            yield name.replace("_", " "), f"{number:,} {more}"
    for name, number in left.items():
        yield name.replace("_", " "), f"{number:,}"


def _generations(said: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each: what made it, and what it added."""
    from vc2.progress import counted

    before = 0
    for number, generation in enumerate(said):
        change = generation.get("change") or {}
        how = {
            "grow": "new rows of the source",
            "retry": f"retry of {', '.join(change.get('reasons', ()))}",
            "remove": f"removal list {change.get('removals', '')[:12]}",
        }.get(change.get("kind", ""), "from scratch")
        shards = counted(generation["next_shard"] - generation["first_shard"], "shard")
        samples = generation["samples"] - before
        before = generation["samples"]
        yield f"  {number:>2}  {how:30} {samples:>+9,} samples  {shards:>12}  {generation['fingerprint'][:12]}"


def _brief(value: Any) -> str:
    """A fact in a line: of many things the first ones."""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    if isinstance(value, dict):
        parts = [f"{name} {_brief(part)}" for name, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [_brief(part) for part in value]
    else:
        return "" if value is None else str(value)
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8:,} more" if len(parts) > 8 else "")


def _entry() -> Any:  # pragma: no cover
    sys.exit(main())


if __name__ == "__main__":
    _entry()
