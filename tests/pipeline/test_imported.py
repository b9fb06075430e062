"""Models from elsewhere become checkpoints that everything goes on from; `vc2 convert` never harms what is there."""

import json
from pathlib import Path

import pytest
import torch

from vc2.artifacts import Checkpoint, ShardSet, load_manifest, verify
from vc2.cli import main
from vc2.errors import ConfigError
from vc2.eval.config import SampleStage
from vc2.eval.generate_rank import load_generator
from vc2.miniature.config import autoencoder_config, image_base_weights, text_config, unet_config
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import Parts, VideoModel
from vc2.model.config import ModelConfig, ScheduleConfig, TextConfig
from vc2.model.convert import Found, read_model, write_model
from vc2.model.files import Tensors, open_weights
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.model.weights import spatial_from_sd
from vc2.pipeline.driver import given_artifacts
from vc2.pipeline.imported import convert, import_model, is_checkpoint_uri
from vc2.train.config import Layout, TrainStage
from vc2.train.parts import build_text_encoder, build_unet
from vc2.train.request import RankRequest


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the miniature's shape in the form that VideoCrafter was released in."""
    torch.manual_seed(0)
    config = ModelConfig(unet=unet_config(), autoencoder=autoencoder_config(), text=text_config())
    model = VideoModel(
        config=config,
        unet=UNet3D(config.unet).eval(),
        schedule=NoiseSchedule(config.schedule),
        autoencoder=Autoencoder(config.autoencoder),
        text=TextEncoder(config.text),
        fps={8: 2, 12: 1},
    )
    folder = tmp_path_factory.mktemp("released")
    model.save(folder / "ours")
    convert(str(folder / "ours"), str(folder / "model.ckpt"), "released", folder / "work")
    return folder / "model.ckpt"


@pytest.fixture
def checkpoint(released, store, tmp_path) -> Checkpoint:
    return import_model(read_model(released), store, tmp_path / "work", source=str(released))


def test_an_imported_model_is_a_checkpoint_named_by_its_content(checkpoint, released, store, tmp_path):
    again = import_model(read_model(released), store, tmp_path / "work", source="another place")
    assert again == checkpoint
    assert list(verify(store, checkpoint.prefix)) == []
    manifest = load_manifest(store, checkpoint.prefix)
    assert manifest.stage == "imported" and checkpoint.step == 0
    assert manifest.file("unet.safetensors").key == manifest.file("unet_ema.safetensors").key
    assert manifest.counts["total_parameters"] == sum(p.numel() for p in UNet3D(unet_config()).parameters())
    assert json.loads(store.read(manifest.file("model.json").key))["fps"] == {"8": 2, "12": 1}
    assert not list((tmp_path / "work").iterdir())


def test_sampling_reads_it(checkpoint, released, store, tmp_path):
    manifest = load_manifest(store, checkpoint.prefix)
    model = load_generator(store, manifest, SampleStage(), tmp_path / "cache", torch.device("cpu")).model
    assert_same(model.unet, read_model(released).parts.load().unet)


def test_training_goes_on_from_it(checkpoint, released, store, tmp_path):
    stage = TrainStage(
        name="spatial",
        model=ModelConfig(unet=unet_config(), autoencoder=autoencoder_config(), text=text_config()),
        num_steps=1,
        device="cpu",
    )
    manifest = load_manifest(store, checkpoint.prefix)
    request = RankRequest(
        stage=stage, store=store.uri, work=str(tmp_path), fingerprint="f" * 64, attempt=1, start=None,
        layout=Layout(world_size=1, micro_batch=1, threads=1), videos=(), images=(),
        autoencoder=manifest.file("autoencoder.safetensors"), start_from=checkpoint, inputs={},
    )  # fmt: skip
    assert_same(build_unet(request, store, tmp_path), read_model(released).parts.load().unet)
    wider = stage.evolve(model=stage.model.evolve(unet=unet_config().evolve(dropout=0.5)))
    with pytest.raises(ConfigError, match=r"another model than model\.unet asks for: dropout=0\.0 \(asked: 0\.5\)"):
        build_unet(request.evolve(stage=wider), store, tmp_path)
    unscaled = stage.evolve(model=stage.model.evolve(schedule=ScheduleConfig(signal_scaling=False)))
    with pytest.raises(ConfigError, match=r"than model\.schedule asks for: signal_scaling=True \(asked: False\)"):
        build_unet(request.evolve(stage=unscaled), store, tmp_path)


def test_the_text_tower_that_a_model_brings_is_the_one_that_is_used(store, tmp_path):
    """No mirror has to have it."""
    text = TextConfig(width=64, heads=1, layers=2, layers_used=1)
    config = ModelConfig(unet=unet_config().evolve(context_dim=64), autoencoder=autoencoder_config(), text=text)
    tower = TextEncoder(text)
    parts = Parts(
        config,
        Tensors.of(UNet3D(config.unet).state_dict()),
        Tensors.of(Autoencoder(config.autoencoder).net.state_dict()),
        Tensors.of(tower.tower.state_dict()),
    )
    made = import_model(Found("released", "", parts), store, tmp_path / "work", source="elsewhere")
    manifest = load_manifest(store, made.prefix)
    request = RankRequest(
        stage=TrainStage(model=config, device="cpu"), store=store.uri, work=str(tmp_path), fingerprint="f" * 64,
        attempt=1, start=None, layout=Layout(world_size=1, micro_batch=1, threads=1), videos=(), images=(),
        autoencoder=manifest.file("autoencoder.safetensors"), start_from=made, inputs={},
    )  # fmt: skip
    assert_same(build_text_encoder(request, store, tmp_path), tower)
    sampled = load_generator(store, manifest, SampleStage(), tmp_path / "cache", torch.device("cpu")).model
    assert_same(sampled.text, tower)
    assert_same(Parts.of_checkpoint(store, manifest, tmp_path / "cache").load().text, tower)


def test_it_stands_for_the_first_training_stage_and_when_evaluated_for_both(checkpoint, store):
    assert given_artifacts(store, (), checkpoint.uri) == {"train/full": checkpoint}
    given = given_artifacts(store, (), checkpoint.uri, stage="evaluate/evalcrafter")
    assert given == {"train/full": checkpoint, "train/spatial": checkpoint}
    with pytest.raises(ConfigError, match="expected a ShardSet"):
        given_artifacts(store, [checkpoint.uri], "")
    assert not isinstance(checkpoint, ShardSet)


def test_a_checkpoint_is_a_source_like_any_other(checkpoint, released, tmp_path):
    done = convert(checkpoint.uri, str(tmp_path / "again.ckpt"), "released", tmp_path / "work", weights="raw")
    assert done.recognised_as == "a checkpoint of stage imported"
    found, expected = (read_model(place).parts for place in (tmp_path / "again.ckpt", released))
    assert found.config == expected.config and found.fps == expected.fps
    assert_same(found.load().unet, expected.load().unet)


def test_the_command_says_what_it_read_and_wrote(released, tmp_path, capsys):
    work = ["--work", str(tmp_path / "work")]
    assert main(["convert", str(released), str(tmp_path / "ours"), "--to", "vc2", "--dtype", "float16", *work]) == 0
    said = capsys.readouterr().out
    assert "released, a VideoCrafter2 text-to-video network" in said and "temporal" in said
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "sd"), "--to", "sd-diffusers", "--json", *work]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["form"] == "vc2" and said["parts"] == ["autoencoder"]
    assert said["parameters"]["total"] == said["parameters"]["spatial"] + said["parameters"]["temporal"]
    assert main(["convert", str(released), str(tmp_path / "store"), "--to", "checkpoint", *work]) == 0
    assert "/runs/imported/" in capsys.readouterr().out


def test_a_file_below_a_folder_called_runs_is_a_file(released, tmp_path):
    """Only what looks like an artifact is looked for in a store."""
    place = tmp_path / "runs" / "exp1" / "model.ckpt"
    place.parent.mkdir(parents=True)
    place.write_bytes(released.read_bytes())
    assert not is_checkpoint_uri(str(place))
    assert convert(str(place), str(tmp_path / "ours"), "vc2", tmp_path / "work").form == "released"
    assert is_checkpoint_uri("s3://bucket/store/runs/full/abc/checkpoints/1")
    assert not is_checkpoint_uri(str(tmp_path / "runs" / "exp1"))


def test_a_checkpoint_is_told_by_its_manifest(checkpoint, tmp_path):
    for place in (checkpoint.uri, f"{checkpoint.uri}/manifest.json"):
        assert is_checkpoint_uri(place)
        assert convert(place, str(tmp_path / "ours"), "vc2", tmp_path / "work", force=True).form == "vc2"
    with pytest.raises(ConfigError, match="--hyper-parameters belongs to released checkpoints"):
        convert(
            checkpoint.uri, str(tmp_path / "x"), "vc2", tmp_path / "work", hyper_parameters=tmp_path / "config.yaml"
        )


@pytest.mark.parametrize(("loudness", "cautions"), [(1, 0), (0.07, 1)], ids=["noise", "velocity"])
def test_growing_from_an_image_network_that_seems_not_to_predict_noise_is_said(tmp_path, capsys, loudness, cautions):
    """Its output turned down to what a velocity predictor would say; no video network, no caution."""
    config = ModelConfig(unet=unet_config(), autoencoder=autoencoder_config(), text=text_config())
    unet = spatial_from_sd(config.unet, open_weights(image_base_weights()))
    spatial = Tensors.of({name: unet[name] * (loudness if name.startswith("conv_out") else 1) for name in unet})
    source = tmp_path / "sd.safetensors"
    write_model(Found("sd-ldm", "", Parts(config, spatial), is_image_network=True), source, "sd-ldm")
    for to, expected in (("vc2", cautions), ("sd-diffusers", 0)):
        arguments = ["convert", str(source), str(tmp_path / to), "--to", to, "--work", str(tmp_path / "work")]
        assert main(arguments) == 0
        assert capsys.readouterr().err.count("its answer to pure noise is not that noise") == expected


def test_what_is_there_is_not_harmed(released, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "model.json").write_text("{}")
    (tmp_path / "both" / "letters.txt").write_text("dear")
    (tmp_path / "model.ckpt").write_text("mine")
    for destination, to, options, words in (
        (released, "released", [], "are one place"),
        (released.parent / "x" / ".." / "model.ckpt", "released", ["--force"], "are one place"),
        (released.parent, "vc2", ["--force"], "one lies in the other"),
        (tmp_path / "model.ckpt", "released", [], "is there already"),
        (tmp_path / "model.ckpt", "vc2", ["--force"], "is a file; form vc2 is a folder"),
        (tmp_path / "mine", "vc2", ["--force"], "holds something else than a model"),
        (tmp_path / "mine", "released", ["--force"], "form released is one file"),
        (tmp_path / "both", "vc2", ["--force"], "holds letters.txt beside a model"),
        (tmp_path / "new", "vc2", ["--fps", "8"], "--fps N belongs to the form `diffusers`"),
        (tmp_path / "new", "diffusers", [], "say which by --fps N"),
    ):
        arguments = ["convert", str(released), str(destination), "--to", to, *options, "--work", str(tmp_path / "work")]
        assert main(arguments) == 1, words
        assert words in capsys.readouterr().err
    assert (tmp_path / "mine" / "letters.txt").read_text() == "dear"
    assert (tmp_path / "model.ckpt").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    convert(str(released), str(tmp_path / "model.ckpt"), "released", tmp_path / "work", force=True)
    assert read_model(tmp_path / "model.ckpt").form == "released"


def test_a_source_that_is_no_model_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "page.ckpt").write_text("<html>")
    assert main(["convert", str(tmp_path / "page.ckpt"), str(tmp_path / "x"), "--to", "vc2"]) == 1
    assert capsys.readouterr().err.strip().endswith("fetch it again")


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
