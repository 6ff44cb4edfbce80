"""scripts/train_h800.sh and train_2node_h800.sh: settings become flags, and what would fail later is said at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from launch_kit import ROOT, SCRIPTS, Launch
from store_kit import write_shard
from vggt_cache.cluster.known_names import names_of

CPU = {"DEVICE": "cpu"}
NODE_1 = {
    "MASTER_ADDR": "192.0.2.1", "NODE_RANK": "1", "NNODES": "2", "script": "train_2node_h800.sh",
    "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip


def refusal(launch: Launch) -> str:
    """The one sentence of a launch that was refused."""
    assert launch.finish() == 2, launch.out
    assert not launch.started
    assert launch.err.startswith("[ERROR] ")
    assert launch.err.count("\n") == 1, launch.err
    return launch.err


def edited(folder: Path, **lines: str) -> Path:
    """A copy of the project's scripts in which lines of train_h800.sh have been replaced, as the guide says."""
    shutil.copytree(SCRIPTS, folder / "a project" / "scripts")
    (folder / "a project" / "src").symlink_to(ROOT / "src")
    script = folder / "a project" / "scripts" / "train_h800.sh"
    text = script.read_text().splitlines()
    for name, value in lines.items():
        at = next(i for i, line in enumerate(text) if line.startswith(f"{name}="))
        text[at] = f'{name}="{value}"'
    script.write_text("\n".join(text) + "\n")
    return script


# ---------------------------------------------------------------- what is started


def test_one_process_is_started_for_each_gpu_with_the_published_settings(tmp_path: Path) -> None:
    launch = Launch(tmp_path, gpus=8)
    assert launch.finish() == 0, launch.err
    arguments = launch.arguments
    assert arguments[: arguments.index("janusvln.train") + 1][:6] == [
        "-m", "vggt_cache.cluster.torchrun", "--nnodes", "1", "--node_rank", "0",
    ]  # fmt: skip
    assert launch.flag("--nproc_per_node") == "8"
    expected = {
        "--model_name_or_path": "model",
        "--train_data_root": "data",
        "--output_dir": "./outputs/vln_h800_8gpu",
        "--deepspeed": str(SCRIPTS / "zero3.json"),
        "--learning_rate": "2e-5",
        "--mm_projector_lr": "1e-5",
        "--gradient_accumulation_steps": "8",
        "--per_device_train_batch_size": "1",
        "--model_max_length": "163840",
        "--max_pixels": "451584",
        "--min_pixels": "12544",
        "--warmup_ratio": "0.03",
        "--bf16": "True",
        "--seed": "42",
    }
    assert {name: launch.flag(name) for name in expected} == expected
    assert launch.flag("--use_cpu") is None
    assert "batch: 64 samples an optimizer step (8 processes x 1 x 8 accumulated)" in launch.out
    assert launch.environment["NCCL_NVLS_ENABLE"] == "0"
    assert str(ROOT / "src") in launch.environment["PYTHONPATH"].split(":")


def test_each_flag_of_the_launcher_is_one_that_the_training_command_knows(tmp_path: Path) -> None:
    arguments = pytest.importorskip("janusvln.train.arguments")
    launch = Launch(tmp_path, "--max_steps", "3", **CPU, LAM="0.3", EXTRA_ARGS="--vggt_cache_threads 4")
    assert launch.finish() == 0, launch.err
    flags = launch.arguments[launch.arguments.index("janusvln.train") + 1 :]
    flags[flags.index("--deepspeed") : flags.index("--deepspeed") + 2] = []  # would start the engine
    model, data, features, training = arguments.parse_arguments(flags)
    assert (model.lam, data.train_data_root, training.max_steps) == (0.3, "data", 3)
    assert features.vggt_cache_threads == 4
    assert training.warmup_steps == 0.03
    assert training.bf16 is False


def test_each_setting_reaches_training(tmp_path: Path) -> None:
    settings = {
        "OUTPUT_DIR": "out put", "PER_DEVICE_BATCH_SIZE": "2", "GRAD_ACCUM_STEPS": "3", "LEARNING_RATE": "1e-4",
        "NUM_EPOCHS": "5", "SAVE_STEPS": "7", "LOGGING_STEPS": "9", "NUM_WORKERS": "0", "LAM": "0.5", "SEED": "1",
        "TUNE_MM_VISION": "True", "REPORT_TO": "none", "MAX_HISTORY_IMAGES": "4", "VGGT_MODEL_PATH": "/not here",
        "NPROC_PER_NODE": "2", "MAX_STEPS": "11", "VGGT_CACHE_MISS": "error",
    }  # fmt: skip
    write_shard(tmp_path / "my cache", [1])
    launch = Launch(tmp_path, "--max_samples", "10 0", **CPU, **settings, VGGT_CACHE_DIR="my cache")
    assert launch.finish() == 0, launch.err
    expected = {
        "--output_dir": "out put", "--per_device_train_batch_size": "2", "--gradient_accumulation_steps": "3",
        "--learning_rate": "1e-4", "--num_train_epochs": "5", "--save_steps": "7", "--logging_steps": "9",
        "--dataloader_num_workers": "0", "--lam": "0.5", "--seed": "1", "--tune_mm_vision": "True",
        "--vision_tower_lr": "1e-6",
        "--report_to": "none", "--max_history_images": "4", "--vggt_model_path": "/not here",
        "--nproc_per_node": "2", "--max_steps": "11", "--vggt_cache_miss": "error", "--vggt_cache_dir": "my cache",
        "--max_samples": "10 0", "--use_cpu": "True", "--bf16": "False",
    }  # fmt: skip
    assert {name: launch.flag(name) for name in expected} == expected
    assert "12 samples an optimizer step" in launch.out
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_annotations_may_be_given_instead_of_a_data_root(tmp_path: Path) -> None:
    launch = Launch(tmp_path, **CPU, DATA_ROOT="", ANNOTATION_PATH="data/train.jsonl", DATA_PATH="data")
    assert launch.finish() == 0, launch.err
    assert (launch.flag("--annotation_path"), launch.flag("--data_path")) == ("data/train.jsonl", "data")
    assert launch.flag("--train_data_root") is None


def test_without_deepspeed_none_is_used_nor_needed(tmp_path: Path) -> None:
    launch = Launch(tmp_path, **CPU, DS_CONFIG="none")
    assert launch.finish() == 0, launch.err
    assert launch.flag("--deepspeed") is None


# ---------------------------------------------------------------- the guide's two ways


def test_an_exported_cache_is_used(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    launch = Launch(tmp_path, **CPU, VGGT_CACHE_DIR=str(tmp_path / "cache"))
    assert launch.finish() == 0, launch.err
    assert launch.flag("--vggt_cache_dir") == str(tmp_path / "cache")
    assert "context frame, 1 shards" in launch.out


def test_a_cache_and_a_configuration_that_are_edited_into_the_script_are_used(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    script = edited(tmp_path, VGGT_CACHE_DIR=str(tmp_path / "cache"), DS_CONFIG="scripts/zero2_offload.json")
    launch = Launch(tmp_path, script=script, **CPU)
    assert launch.finish() == 0, launch.err
    assert launch.flag("--vggt_cache_dir") == str(tmp_path / "cache")
    assert str(launch.flag("--deepspeed")).endswith("a project/scripts/zero2_offload.json")
    assert "ZeRO-2" in launch.out
    both = Launch(tmp_path, **CPU, **{**NODE_1, "script": str(script.parent / "train_2node_h800.sh")})
    assert both.finish() == 0, both.err
    assert both.flag("--vggt_cache_dir") == str(tmp_path / "cache")


# ---------------------------------------------------------------- log, exit code, signals


def test_the_log_has_what_the_terminal_has_and_the_exit_code_is_kept(tmp_path: Path) -> None:
    launch = Launch(tmp_path, **CPU, CODE="7")
    assert launch.finish() == 7
    (log,) = launch.logs()
    assert log.name.startswith("train_")
    assert log.parent.name == "vln_h800_8gpu"
    text = log.read_text()
    assert "step 1\nstep 2" in text  # universal newlines: a carriage return
    assert "[INFO] model: model" in text
    assert all(line in launch.out for line in text.splitlines())
    assert launch.err == "[ERROR] of rank 1\n"  # said again at the end, below torchrun's own report


@pytest.mark.parametrize(
    ("number", "ctrl_c", "code"),
    [
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGUSR1, False, 143),
        (signal.SIGINT, True, 130),
    ],
)
def test_a_signal_reaches_training_once_and_its_end_is_waited_for(
    number: signal.Signals, ctrl_c: bool, code: int, tmp_path: Path
) -> None:
    launch = Launch(tmp_path, **CPU, HOLD="1")
    deadline = time.monotonic() + 30
    while not launch.started and time.monotonic() < deadline:
        time.sleep(0.02)
    # A terminal sends Ctrl-C to all processes of the group that it has started; training must not be one of them.
    assert launch.process_group != launch.process.pid
    (os.killpg if ctrl_c else os.kill)(launch.process.pid, number)
    assert launch.finish() == code
    told = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    assert (tmp_path / "seen.signals").read_text().split() == [told]


def test_a_signal_goes_to_the_processes_that_train_and_not_to_torchrun(tmp_path: Path) -> None:
    """All processes get it, as from SLURM: torchrun would end by SIGUSR1, and tee by any."""
    launch = Launch(tmp_path, **CPU, RANKS="1")
    deadline = time.monotonic() + 30
    while not (tmp_path / "seen.rank").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(launch.process_group, signal.SIGUSR1)
    os.kill(launch.process.pid, signal.SIGUSR1)
    assert launch.finish() == 143
    assert not (tmp_path / "seen.signals").exists()
    assert "rank: SIGTERM" in launch.out
    assert launch.out.splitlines()[-1].startswith("[INFO] training ended with exit code 143: see ")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"DEVICE": "auto"}, "no GPU is visible"),
        ({"DEVICE": "tpu"}, "DEVICE is 'tpu'"),
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE is 'two', which is not a whole number"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is 0, so nothing would be trained"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, and ports are 1 to 65535"),
        ({"PYTHON": "/not/here"}, "PYTHON is '/not/here', which is not a program"),
        ({"MODEL_PATH": "/not/here"}, "MODEL_PATH /not/here does not exist"),
        ({"MODEL_PATH": "data"}, "MODEL_PATH data has no config.json"),
        ({"DATA_ROOT": ""}, "neither DATA_ROOT nor ANNOTATION_PATH is set"),
        ({"ANNOTATION_PATH": "data/train.jsonl"}, "both DATA_ROOT and ANNOTATION_PATH are set"),
        ({"DATA_ROOT": "/not/here"}, "DATA_ROOT /not/here cannot be read on this machine (No such file"),
        ({"DATA_ROOT": "", "ANNOTATION_PATH": "a.json"}, "ANNOTATION_PATH names a.json"),
        (
            {"VGGT_MODEL_PATH": "/not/here"},
            "VGGT_CACHE_DIR is not set and VGGT_MODEL_PATH '/not/here' does not exist",
        ),
        ({"VGGT_CACHE_DIR": "/not/here"}, "there is no directory /not/here, so there is no cache to read"),
        ({"VGGT_CACHE_DIR": "data"}, "VGGT_CACHE_DIR data holds no feature cache"),
        (
            {"VGGT_CACHE_DIR": "data", "VGGT_CACHE_STAGE": "stage", "VGGT_CACHE_STAGE_LIMIT": "2X"},
            "the limit of what is staged is '2X', which is not a size",
        ),
        ({"DS_CONFIG": "scripts/zero9.json"}, "DS_CONFIG scripts/zero9.json cannot be read"),
        ({"DS_CONFIG": "data/train.jsonl"}, "DS_CONFIG data/train.jsonl is no DeepSpeed configuration"),
        ({"OUTPUT_DIR": "model/config.json"}, "OUTPUT_DIR model/config.json cannot be written"),
        ({"VGGT_CACHE_IO": "mmap"}, "VGGT_CACHE_IO is 'mmap', and auto, direct and buffered are known"),
        ({"VGGT_CACHE_MISS": "fil"}, "VGGT_CACHE_MISS is 'fil', and encode, fill and error are known"),
        ({"GRAD_ACCUM_STEPS": "x"}, "GRAD_ACCUM_STEPS is 'x', which is not a whole number"),
        ({"NUM_WORKERS": "-1"}, "NUM_WORKERS is '-1', which is not a whole number"),
        ({"MAX_STEPS": "all"}, "MAX_STEPS is 'all', which is no number of steps"),
        ({"LEARNING_RATE": "2e-5x"}, "LEARNING_RATE is '2e-5x', which is not a number"),
        ({"LAM": "half"}, "LAM is 'half', which is not a number"),
        ({"BF16": "bf16"}, "BF16 is 'bf16', and True and False are known"),
        ({"TUNE_MM_LLM": "ja"}, "TUNE_MM_LLM is 'ja', and True and False are known"),
        ({"MIN_PIXELS": "900000"}, "MIN_PIXELS is 900000 and MAX_PIXELS 451584, so no image would do"),
        ({"OPTIM": "adamw"}, "does not know: give adamw_torch, or another of"),
        ({"LR_SCHEDULER_TYPE": "cosinus"}, "LR_SCHEDULER_TYPE is 'cosinus', which transformers "),
        ({"REPORT_TO": "tensorbord"}, "REPORT_TO is 'tensorbord', which transformers "),
        ({"REPORT_TO": "wandb"}, "-m pip install wandb, or set REPORT_TO=none"),
        # As the guide spells it: never passed over.
        (
            {"per_device_batch_size": "2"},
            "per_device_batch_size is set to '2', and settings are read in capitals",
        ),
        ({"master_addr": "10.0.0.1"}, "write MASTER_ADDR=10.0.0.1 instead"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_started(
    settings: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(Launch(tmp_path, **{**CPU, **settings}))


def test_what_is_known_before_the_start_is_what_transformers_knows() -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    assert names_of("training_args.py", "OptimizerNames") == tuple(one.value for one in OptimizerNames)
    assert names_of("trainer_utils.py", "SchedulerType") == tuple(one.value for one in utils.SchedulerType)
    loggers = names_of("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    assert loggers == tuple(INTEGRATION_TO_CALLBACK)


def test_a_setting_behind_the_command_is_not_passed_over(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "per_device_batch_size=2", **CPU)
    assert "write PER_DEVICE_BATCH_SIZE=2 before it" in refusal(launch)


@pytest.mark.parametrize(
    ("flag", "variable"),
    [("--output_dir", "OUTPUT_DIR"), ("--per-device-batch-size=2", "PER_DEVICE_BATCH_SIZE")],
)
def test_a_flag_that_the_checks_before_the_start_would_not_see_is_refused(
    flag: str, variable: str, tmp_path: Path
) -> None:
    sentence = f"what is checked before the start is {variable}: set that instead"
    assert sentence in refusal(Launch(tmp_path, flag, "2", **CPU))
    assert sentence in refusal(Launch(tmp_path, **CPU, EXTRA_ARGS=f"{flag} 2"))


def test_a_lower_case_line_that_is_edited_into_the_script_is_refused(tmp_path: Path) -> None:
    script = edited(tmp_path)
    script.write_text(script.read_text().replace('\nNUM_EPOCHS="', '\nper_device_batch_size=2\nNUM_EPOCHS="'))
    assert "write PER_DEVICE_BATCH_SIZE=2 instead" in refusal(Launch(tmp_path, script=script, **CPU))


def test_all_other_spellings_of_numbers_and_truth_are_taken(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path, **CPU, LEARNING_RATE=".5E-4", NUM_EPOCHS="2.5", TUNE_MM_MLP="yes", SAVE_STEPS="0.1"
    )
    assert launch.finish() == 0, launch.err


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    assert "NPROC_PER_NODE is 3 and 2 GPUs are visible" in refusal(
        Launch(tmp_path, gpus=2, NPROC_PER_NODE="3")
    )
    hidden = Launch(tmp_path, gpus=2, CUDA_VISIBLE_DEVICES="-1")
    assert "no GPU is visible" in refusal(hidden)


def test_the_cpu_may_be_allowed_instead_of_asked_for(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ALLOW_CPU="1")
    assert launch.finish() == 0, launch.err
    assert launch.flag("--nproc_per_node") == "1"
    assert launch.flag("--use_cpu") == "True"


def test_a_port_that_is_taken_is_refused_and_none_is_taken_by_default(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"MASTER_PORT {port} is in use" in refusal(Launch(tmp_path, **CPU, MASTER_PORT=port))
        launch = Launch(tmp_path, **CPU)
        assert launch.finish() == 0
        assert launch.flag("--master_port") not in (None, "", port)


def test_a_cache_need_not_exist_where_training_fills_it(tmp_path: Path) -> None:
    launch = Launch(tmp_path, **CPU, VGGT_CACHE_DIR="new", VGGT_CACHE_MISS="fill")
    assert launch.finish() == 0, launch.err
    assert "cache new (empty); missing ones are computed and put into the cache" in launch.out


def test_a_missing_encoder_is_no_fault_beside_a_cache(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    launch = Launch(tmp_path, **CPU, VGGT_CACHE_DIR="cache", VGGT_MODEL_PATH="/not/here")
    assert launch.finish() == 0, launch.err
    assert "there is no VGGT at '/not/here': that is no fault as long as no feature is missing" in launch.out


def test_a_start_that_goes_on_from_a_checkpoint_says_so(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / "outputs" / "vln_h800_8gpu" / f"checkpoint-{step}").mkdir(parents=True)
    launch = Launch(tmp_path, **CPU)
    assert launch.finish() == 0, launch.err
    assert "going on from checkpoint-10" in launch.out


# ---------------------------------------------------------------- several nodes


def test_a_node_is_told_where_to_meet_and_has_a_log_of_its_own(tmp_path: Path) -> None:
    launch = Launch(tmp_path, gpus=4, **NODE_1, NCCL_IB_HCA="mlx5_0")
    assert launch.finish() == 0, launch.err
    expected = {"--nnodes": "2", "--node_rank": "1", "--master_addr": "192.0.2.1", "--master_port": "29500"}
    assert {name: launch.flag(name) for name in expected} == expected
    assert launch.environment["NCCL_IB_HCA"] == "mlx5_0"
    assert "batch: 64 samples" in launch.out
    assert "NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo NCCL_IB_HCA=mlx5_0" in launch.out
    (log,) = launch.logs()
    assert log.name.startswith("node1_")  # nodes share the directory
    assert (
        f"[INFO] log: {log.relative_to(tmp_path)}; the progress of the run is in that of node 0"
        in launch.out.replace("./", "")
    )
    assert launch.out.splitlines()[-1] == "[INFO] training has come to its end"
    assert log.parent.name == "vln_h800_2node"


def test_the_infiniband_cards_are_left_to_nccl_unless_given(tmp_path: Path) -> None:
    launch = Launch(tmp_path, gpus=1, **NODE_1)
    assert launch.finish() == 0, launch.err
    assert "NCCL_IB_HCA" not in launch.environment


def test_variables_of_several_nodes_do_not_count_on_one(tmp_path: Path) -> None:
    launch = Launch(tmp_path, **CPU, NNODES="2", NODE_RANK="1", MASTER_ADDR="192.0.2.1")
    assert launch.finish() == 0, launch.err
    assert launch.flag("--nnodes") == "1"
    assert launch.flag("--master_addr") == "127.0.0.1"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"NODE_RANK": ""}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"NNODES": "two"}, "NNODES is 'two', which is not a whole number"),
        ({"NODE_RANK": "2"}, "NODE_RANK is 2, and the ranks of 2 nodes are 0 to 1"),
        (
            {"MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR is 'no.such.host.invalid', and this machine cannot find",
        ),
        ({"MASTER_ADDR": "127.0.0.1"}, "an address that no other node can reach"),
        ({"NCCL_SOCKET_IFNAME": "eth99"}, "NCCL_SOCKET_IFNAME is 'eth99', and this machine has "),
        ({"GLOO_SOCKET_IFNAME": "eth99"}, "GLOO_SOCKET_IFNAME is 'eth99', and this machine has "),
    ],
)
def test_what_is_wrong_with_a_node_is_one_sentence(
    settings: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(Launch(tmp_path, **{**CPU, **NODE_1, **settings}))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero2_offload", 2), ("zero3", 3)])
def test_configurations_leave_to_the_trainer_what_it_sets(name: str, stage: int) -> None:
    config = json.loads((SCRIPTS / f"{name}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    for setting in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[setting] == "auto"
    assert config["bf16"] == {"enabled": "auto"}
    offloaded = "offload_optimizer" in config["zero_optimization"]
    assert offloaded == name.endswith("offload")
    # Otherwise DeepSpeed compiles an optimizer of its own on the first start, with a compiler that nodes may not have.
    assert offloaded == (config.get("zero_force_ds_cpu_optimizer") is False)


# ---------------------------------------------------------------- SLURM


@pytest.mark.parametrize(
    ("code", "warned", "queued"), [(143, True, True), (0, True, False), (2, False, False)]
)
def test_the_job_for_slurm_hands_the_warning_on_and_queues_itself_only_where_training_was_stopped(
    tmp_path: Path, code: int, warned: bool, queued: bool
) -> None:
    """The very script of the document, with stand-ins for srun and scontrol."""
    document = (Path(__file__).parent.parent / "docs" / "multi_node.md").read_text()
    job = document.split("## SLURM\n")[1].split("```bash\n")[1].split("```")[0]
    (tmp_path / "job").write_text(job)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f"#!/bin/bash\ntrap 'echo told >>told; sleep 0.3; exit {code}' USR1\ntouch started\n"
        + ("while true; do sleep 0.05; done\n" if warned else f"exit {code}\n")
    )
    (tools / "scontrol").write_text(
        '#!/bin/bash\nif [[ $1 == show ]]; then echo node0; else echo "$*" >>queued; fi\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node0"}
    process = subprocess.Popen(["bash", "job"], cwd=tmp_path, env=environment)
    if warned:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == code
    assert (tmp_path / "told").exists() == warned
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 77\n"
