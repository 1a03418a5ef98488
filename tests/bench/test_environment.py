"""What a record says of the hardware."""

from bench.harness.environment import _counted_gpus, command_line

TWO = "0, GPU-a, NVIDIA H200\n1, GPU-b, NVIDIA H200"
FOUR = f"{TWO}\n2, GPU-c, NVIDIA H200\n3, GPU-d, NVIDIA H100 80GB HBM3"


def test_gpus_are_counted_by_name() -> None:
    assert _counted_gpus(TWO, None) == ["2 x NVIDIA H200"]
    assert _counted_gpus(FOUR, None) == ["1 x NVIDIA H100 80GB HBM3", "3 x NVIDIA H200"]
    assert _counted_gpus("", None) == []


def test_a_share_of_a_host_is_called_one() -> None:
    assert _counted_gpus(FOUR, "1,2") == ["2 x NVIDIA H200 (of 4 in the host)"]
    assert _counted_gpus(FOUR, "GPU-d") == ["1 x NVIDIA H100 80GB HBM3 (of 4 in the host)"]
    assert _counted_gpus(TWO, "0,1") == ["2 x NVIDIA H200"]
    assert _counted_gpus(TWO, "") == []


def test_a_command_names_no_folder_of_its_machine() -> None:
    given = ["run", "--results-dir", "/mnt/x", "--profile", "cpu", "--hold=/mnt/go", "--out", "/mnt/z", "--blocks", "2"]
    wanted = ["python", "-m", "bench", "run", "--profile", "cpu", "--blocks", "2"]
    assert command_line(arguments=given) == wanted
