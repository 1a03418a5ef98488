"""With this folder on PYTHONPATH, ``import triton`` gives a stand-in where there is no Triton."""

import importlib.util

_sglang = importlib.util.find_spec("sglang")
if _sglang is not None and importlib.util.find_spec("triton") is None:
    import triton_stand_in

    triton_stand_in.install()


def _fork_from_a_process_that_has_imported_sglang() -> None:
    """SGLang spawns each process anew, and importing it takes each some 10 s of a core; a fork server needs no import.

    Only on the CPU: a process that has touched CUDA can't be forked.
    """
    import multiprocessing

    set_start_method = multiprocessing.set_start_method

    def with_fork_server(method, force=False):
        if method == "spawn":
            import sglang_cpu_engine_fork

            sglang_cpu_engine_fork.install()
            method = "forkserver"
        set_start_method(method, force)

    multiprocessing.set_start_method = with_fork_server


if _sglang is not None:
    _fork_from_a_process_that_has_imported_sglang()
