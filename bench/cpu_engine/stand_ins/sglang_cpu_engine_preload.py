"""What SGLang's processes import, for the fork server (see sitecustomize.py)."""

import multiprocessing

import sglang.srt.managers.data_parallel_controller
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler  # noqa: F401

# For the processes forked from here: one that starts others (data parallelism) has a fork server of its own.
multiprocessing.set_forkserver_preload([__name__])
