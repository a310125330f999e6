"""Blocks that compute their activations again: compiled, in CUDA graphs, quantised, and killed.

python -m pytest -q tests/test_recomputation.py
"""

import json
import random
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.compile_fx as compile_fx
from conftest import (
    LONG,
    finish,
    new_run,
    outcome,
    random_samples,
    refused,
    trained_parameters,
    wait_for,
    with_random_lora,
)
from test_train import run_training

import data
import model as chatglm
import train
from support import fp8, memory
from support.checkpoints import ADAPTER, is_intact, list_checkpoints
from support.files import LOCK

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=cuda)]


def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="needs requirements-quantization.txt")


@pytest.fixture(autouse=True, scope="module")
def compiled_anew():
    """Forgets what other files compiled. Past a limit, blocks would silently run uncompiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- compiled blocks --------------------------------------------------------------------------


class Compiled:
    """The built-in model in fp32, compiled, with LoRA dropout 0.3 and a B that is not zero."""

    def __init__(self, device):
        base = chatglm.load_model(chatglm.built_in_model(), device, "fp32")
        targets = ["query_key_value", "dense_4h_to_h"]
        peft_model = with_random_lora(base, dropout=0.3, target_modules=targets)
        self.model = peft_model.get_base_model().train()
        self.trained = trained_parameters(peft_model)
        self.scaler = torch.amp.GradScaler(device, enabled=False)
        samples = random_samples([20, 30, 41], 1400)
        for input_ids, _ in samples:
            input_ids[:8] = torch.arange(100, 108)
        self.batch = data.collate(samples, prefix_length=8).to(device)
        self.divisor = torch.tensor(50.0, device=device)
        train.compile_training(self.model)

    def recompute(self, blocks):
        self.model.transformer.encoder.recomputed_layers = blocks

    def gradients(self, blocks, seed=3):
        """→ (the loss, {name: gradient of an A or a B}) with so many recomputed blocks"""
        self.recompute(blocks)
        for param in self.trained.values():
            param.grad = None
        torch.manual_seed(seed)
        loss = train.forward_backward(self.model, self.scaler, self.batch, self.divisor)
        return loss.item(), {name: param.grad for name, param in self.trained.items()}

    def loss_at(self, blocks, moved, seed=3):
        """The loss where each trained tensor is moved by {name: change}, with the same masks."""
        self.recompute(blocks)
        with torch.no_grad():
            for name, param in self.trained.items():
                param.add_(moved[name])
        torch.manual_seed(seed)
        loss = train.forward_loss(self.model, self.batch, self.divisor).item()
        with torch.no_grad():
            for name, param in self.trained.items():
                param.sub_(moved[name])
        return loss

    def stored_bytes(self, blocks):
        """How much a forward pass stores for backward, parameters not counted."""
        self.recompute(blocks)
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        stored = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                stored.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train.forward_loss(self.model, self.batch, self.divisor)
        return sum(stored)


@pytest.fixture(scope="module", params=CPU_AND_CUDA)
def compiled(request):
    return Compiled(request.param)


def largest_difference(found, wanted):
    """→ the largest difference of two gradients, as a part of the gradient's largest element"""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("blocks", [2, 4])
def test_compiled_blocks_that_recompute_repeat_their_dropout(compiled, blocks):
    """A loss alone tells nothing. Where backward drew other masks, only gradients were wrong."""
    assert len(compiled.model.transformer.encoder.layers) == 4
    wanted_loss, wanted = compiled.gradients(0)
    loss, found = compiled.gradients(blocks)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert len(wanted) == 16 and sum("lora_B" in name for name in wanted) == 8
    for name, param in compiled.trained.items():
        assert param.any() and wanted[name].any(), name
        assert largest_difference(found[name], wanted[name]) < 1e-5, name
    _, other = compiled.gradients(blocks, seed=4)  # dropout was on: another seed, other gradients
    assert min(largest_difference(other[name], wanted[name]) for name in wanted) > 1e-3


@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_compiled_gradients_are_the_slope_of_their_loss_under_dropout(compiled, blocks):
    """The path that keeps everything is checked too: both could draw the same wrong masks."""
    _, grads = compiled.gradients(blocks)
    squares = sum(grad.square().sum() for grad in grads.values()).item()
    step = 0.02 / squares  # so that the loss changes by 0.04
    ahead = compiled.loss_at(blocks, {name: step * grad for name, grad in grads.items()})
    behind = compiled.loss_at(blocks, {name: -step * grad for name, grad in grads.items()})
    assert (ahead - behind) / (2 * step) == pytest.approx(squares, rel=5e-3)


def test_compiled_blocks_that_recompute_store_less(compiled):
    stored = [compiled.stored_bytes(blocks) for blocks in range(5)]
    assert all(less < more for more, less in zip(stored, stored[1:], strict=False)), stored
    assert stored[4] < stored[0] / 2, stored


def test_compiled_blocks_that_recompute_on_a_cpu_follow_eager(tmp_path):
    """Two of four blocks recompute, so that both kinds are compiled."""
    eager, _ = run_training(tmp_path / "eager")
    flags = ["--compile", "--gradient-checkpointing", 2]
    losses, _ = run_training(tmp_path / "compiled", *flags)
    torch.testing.assert_close(losses, eager, rtol=0, atol=1e-5)


# --- when CUDA graphs are used ----------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, compile, asked, expected",
    [
        (0, False, None, True),
        (0, True, None, True),
        (2, True, None, True),
        (4, True, True, True),
        (4, True, False, False),
        (2, False, None, False),
        (4, False, False, False),
        (4, False, True, "checkpointed blocks without --compile"),
    ],
)
def test_when_graphs_are_used(monkeypatch, blocks, compile, asked, expected):
    """A stand-in is a model on CUDA, so that this is known without a device, too."""
    monkeypatch.setattr(train, "CUDAGraphs", lambda micro_step, like: "graphs")
    model = SimpleNamespace(
        device=torch.device("cuda"),
        transformer=SimpleNamespace(encoder=SimpleNamespace(recomputed_layers=blocks)),
        output_layer_has_dropout=lambda: False,
    )
    args = SimpleNamespace(cuda_graphs=asked, compile=compile)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            train.with_cuda_graphs(args, model, "launches")
    else:
        wanted = "graphs" if expected else "launches"
        assert train.with_cuda_graphs(args, model, "launches") == wanted


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_graphs_on_a_cpu_are_refused_in_one_line(tmp_path, capsys, flags):
    asked = ["--cuda-graphs", "--gradient-checkpointing", "all", "--device", "cpu", *flags]
    told = refused(capsys, *asked, "--output-dir", tmp_path / "out")
    assert told.endswith("--cuda-graphs needs a CUDA device; leave it out")
    assert not (tmp_path / "out").exists()


@cuda
def test_graphs_of_blocks_that_recompute_uncompiled_are_refused_on_cuda(tmp_path, capsys):
    asked = ["--cuda-graphs", "--gradient-checkpointing", "all", "--device", "cuda"]
    told = refused(capsys, *asked, "--output-dir", tmp_path / "out")
    assert "--cuda-graphs can't replay checkpointed blocks without --compile" in told
    assert not (tmp_path / "out").exists()


# --- on CUDA ----------------------------------------------------------------------------------


def uses_graphs(*flags, load_in=None):
    """Whether a run on CUDA replays its micro-steps, with these flags and no wish for graphs."""
    base = chatglm.load_model(chatglm.built_in_model(), "cuda", load_in=load_in)
    one = new_run(chatglm.add_lora(base, 8, 32, 0.1, ["query_key_value"]), *map(str, flags))
    return isinstance(train.make_micro_step(one), train.CUDAGraphs)


@cuda
@pytest.mark.parametrize("blocks", [2, "all"])
def test_compiled_blocks_that_recompute_use_cuda_graphs_by_default(blocks):
    assert uses_graphs("--compile", "--gradient-checkpointing", blocks)
    assert not uses_graphs("--gradient-checkpointing", blocks)


@cuda
@pytest.mark.parametrize("blocks", [2, "all"])
def test_graphs_of_blocks_that_recompute_are_bit_equal_to_launches(tmp_path, blocks):
    flags = ["--compile", "--gradient-checkpointing", blocks, "--lora-dropout", 0.1]
    launches = run_training(tmp_path / "a", *flags, "--no-cuda-graphs", device="cuda")
    graphs = run_training(tmp_path / "b", *flags, "--cuda-graphs", device="cuda")
    assert torch.equal(graphs[0], launches[0]) and graphs[1] == launches[1]


@cuda
@pytest.mark.parametrize("blocks", [2, "all"])
def test_compiled_blocks_that_recompute_follow_eager_on_cuda(tmp_path, blocks):
    eager, _ = run_training(tmp_path / "eager", "--no-cuda-graphs", device="cuda")
    flags = ["--compile", "--gradient-checkpointing", blocks]
    losses, _ = run_training(tmp_path / "compiled", *flags, device="cuda")
    torch.testing.assert_close(losses, eager, rtol=1e-2, atol=0)


# What is recomputed without --compile has no graphs.
QUANTISED = [
    ([], True),
    (["--compile"], True),
    (["--gradient-checkpointing", "all"], False),
    (["--compile", "--gradient-checkpointing", "all"], True),
]


@cuda
@pytest.mark.parametrize("flags, has_graphs", QUANTISED)
def test_a_quantised_base_uses_cuda_graphs_by_default(flags, has_graphs):
    needs_bitsandbytes()
    assert uses_graphs(*flags, load_in="4bit") == has_graphs


@cuda
@pytest.mark.parametrize("flags", [flags for flags, has_graphs in QUANTISED if has_graphs])
def test_graphs_of_a_quantised_base_are_bit_equal_to_launches(tmp_path, flags):
    needs_bitsandbytes()
    flags = ["--load-in", "4bit", "--lora-dropout", 0.1, *flags]
    launches = run_training(tmp_path / "a", *flags, "--no-cuda-graphs", device="cuda")
    graphs = run_training(tmp_path / "b", *flags, "--cuda-graphs", device="cuda")
    assert torch.equal(graphs[0], launches[0]) and graphs[1] == launches[1]


@cuda
@pytest.mark.parametrize("flags", [flags for flags, _ in QUANTISED if flags])
def test_a_quantised_base_follows_eager_on_cuda(tmp_path, flags):
    needs_bitsandbytes()
    common = ["--load-in", "4bit"]
    eager, _ = run_training(tmp_path / "eager", *common, "--no-cuda-graphs", device="cuda")
    losses, _ = run_training(tmp_path / "other", *common, *flags, device="cuda")
    torch.testing.assert_close(losses, eager, rtol=1e-2, atol=0)


# --- float8: memory is taken for copies first, for activations second -------------------------


class Trials:
    """A run on a base in float8 and a stand-in `attempt`, which fits as `fits(copies, n)` says."""

    def __init__(self, fits, *flags):
        base = chatglm.load_model(chatglm.built_in_model(), "cpu", load_in="fp8")
        layers = base.transformer.encoder.layers
        self.model, self.fits, self.layers = base, fits, len(layers)
        self.matrices = [m for m in layers.modules() if isinstance(m, fp8.Float8Linear)]
        progress = SimpleNamespace(recomputed_layers=0)
        args = train.parse_args(list(flags))
        self.run = SimpleNamespace(args=args, model=base, checkpoint=None, progress=progress)
        self.tried = []  # (whether the copies are stored, so many blocks)

    def copies(self):
        """Whether the transposed copies are stored: of all matrices, or of none."""
        stored = {matrix.transposed is not None for matrix in self.matrices}
        assert len(stored) == 1, "copies of some matrices only"
        return stored.pop()

    def attempt(self, blocks):
        self.tried.append((self.copies(), blocks))
        return self.tried[-1] if self.fits(*self.tried[-1]) else None

    def start(self):
        return memory.recompute_as_wanted(self.run, self.attempt, self.layers)


def test_transposed_copies_are_stored_before_the_first_attempt():
    trials = Trials(lambda copies, blocks: True)
    assert len(trials.matrices) == 16 and not trials.copies()
    assert trials.start() == (True, 0) and trials.tried == [(True, 0)]
    for matrix in trials.matrices:
        assert torch.equal(matrix.transposed.float(), matrix.weight.float().t())


@pytest.mark.parametrize("needed", [0, 1, 3, 4])
def test_copies_are_given_up_before_a_block_is_recomputed(needed):
    trials = Trials(lambda copies, blocks: not copies and blocks >= needed)
    assert trials.start() == (False, needed) and trials.tried[-1] == (False, needed)
    assert trials.tried[:2] == [(True, 0), (False, 0)]
    assert not any(copies for copies, _ in trials.tried[1:])


def test_a_wanted_number_of_blocks_gives_up_copies_too_but_is_kept():
    trials = Trials(lambda copies, blocks: not copies, "--gradient-checkpointing", "2")
    assert trials.start() == (False, 2) and trials.tried == [(True, 2), (False, 2)]
    trials = Trials(lambda copies, blocks: False, "--gradient-checkpointing", "2")
    assert trials.start() is None and trials.tried == [(True, 2), (False, 2)]


@pytest.mark.parametrize("flags, needed", [(["off"], 0), (["auto"], 0), (["auto"], 3), (["2"], 2)])
@pytest.mark.parametrize("room", [7, 0])
def test_copies_that_do_not_fit_are_given_up(monkeypatch, flags, needed, room):
    """Memory runs out after `room` of the copies. The rest is as if they were never wanted."""
    transposed, calls = torch.Tensor.t, []
    trials = Trials(lambda copies, blocks: blocks >= needed, "--gradient-checkpointing", *flags)

    def t(tensor):
        calls.append(tensor.dtype == fp8.E4M3)
        if sum(calls) > room:
            raise torch.OutOfMemoryError("out of memory")
        return transposed(tensor)

    monkeypatch.setattr(torch.Tensor, "t", t)
    assert trials.start() == (False, needed)
    assert sum(calls) == room + 1 and not any(copies for copies, _ in trials.tried)
    first = 2 if flags == ["2"] else 0
    assert trials.tried[0] == (False, first)


@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing", "all"], ["--cuda-graphs"]])
@pytest.mark.parametrize("before", [0, 3])
def test_a_resumed_run_recomputes_as_many_blocks_as_before(flags, before):
    for fits, wanted in (
        (lambda copies, blocks: True, [(True, before)]),
        (lambda copies, blocks: not copies, [(True, before), (False, before)]),
        (lambda copies, blocks: blocks > before, [(True, before), (False, before)]),
    ):
        trials = Trials(fits, *flags)
        trials.run.checkpoint, trials.run.progress.recomputed_layers = "checkpoint-2", before
        found = trials.start()
        assert trials.tried == wanted
        assert found == (wanted[-1] if fits(*wanted[-1]) else None)


# --- runs that are killed ---------------------------------------------------------------------


def go_on_after_kills(start, tmp_path, arguments, blocks, wanted_hits):
    """Kills runs at random moments until `wanted_hits` of them had a checkpoint and no result.

    Each goes on with --resume, and must end as an undisturbed run does, bit for bit.
    """
    arguments = [*arguments, "--output-dir"]
    directory = tmp_path / "undisturbed"
    process = start(*arguments, directory)
    wait_for(lambda: list_checkpoints(directory), process)
    began = time.perf_counter()
    finish(process)
    rest = time.perf_counter() - began
    wanted = outcome(directory)
    state = json.loads((list_checkpoints(directory)[0] / "training_state.json").read_text())
    assert state["progress"]["checkpointed"] == blocks
    moments = random.Random(0)
    hits = 0
    for kill in range(3 * wanted_hits):
        directory = tmp_path / str(kill)
        process = start(*arguments, directory)
        wait_for(lambda: list_checkpoints(directory), process)  # noqa: B023
        if kill % 2:  # while a checkpoint is written
            wait_for(lambda: list(directory.glob("*.part")), process)  # noqa: B023
        else:
            time.sleep(moments.uniform(0, 0.6 * rest))
        process.kill()
        process.join()
        was_running = not any((directory / name).exists() for name in ADAPTER)
        if was_running and any(map(is_intact, list_checkpoints(directory))):
            hits += 1
            told = finish(start(*arguments, directory, "--resume"))
            assert re.search(r"checkpoint-\d+, \d+ of \d+ updates done", told), told
            assert outcome(directory) == wanted
            assert not list(directory.glob("*.part")) and not (directory / LOCK).exists()
        shutil.rmtree(directory)
        if hits == wanted_hits:
            return
    raise AssertionError(f"only {hits} kills hit a run between its checkpoints")


def test_a_killed_run_that_recomputes_goes_on_bit_for_bit(tmp_path, start):
    flags = ["--device", "cpu", "--gradient-checkpointing", 2, "--max-steps", 10]
    flags += ["--batch-size", 1]
    go_on_after_kills(start, tmp_path, [*LONG, *flags], 2, wanted_hits=4)


@cuda
def test_a_killed_run_that_recomputes_in_cuda_graphs_goes_on_bit_for_bit(tmp_path, start):
    flags = ["--device", "cuda", "--compile", "--gradient-checkpointing", "all"]
    go_on_after_kills(start, tmp_path, [*LONG, *flags], 4, wanted_hits=4)


@cuda
def test_a_killed_run_of_a_quantised_base_goes_on_bit_for_bit_on_cuda(tmp_path, start):
    needs_bitsandbytes()
    flags = ["--device", "cuda", "--load-in", "4bit"]
    go_on_after_kills(start, tmp_path, [*LONG, *flags], 0, wanted_hits=4)


def test_blocks_that_would_run_uncompiled_end_the_run(tmp_path, monkeypatch, capsys):
    """Past torch's limit of recompilations they would not be recomputed either."""
    set_up = train.set_up_compiler

    def with_a_low_limit():
        set_up()
        assert torch._dynamo.config.recompile_limit > 8
        torch._dynamo.config.recompile_limit = 1  # kept and recomputed blocks are two kinds

    def no_compiler(graph_module, inputs, **options):  # dynamo alone counts
        return graph_module.forward

    monkeypatch.setattr(train, "set_up_compiler", with_a_low_limit)
    monkeypatch.setattr(compile_fx, "compile_fx", no_compiler)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        flags = ["--compile", "--gradient-checkpointing", 2, "--device", "cpu"]
        told = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    assert "--compile: " in told and not (tmp_path / "out").exists()
