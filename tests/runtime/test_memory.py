"""What is free, from the files in which Linux says so."""

import pytest

from dynaip_jax.errors import OutOfMemory, out_of_memory
from dynaip_jax.runtime import memory

KIB, MIB = 2**10, 2**20


@pytest.fixture
def root(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


MEMINFO = "MemTotal:  9000 kB\nMemAvailable:    4000 kB\nSwapFree:  500 kB\nHugePages_Total:  0\n"


def test_of_a_host(root):
    assert memory.host_free_bytes(root({"proc/meminfo": MEMINFO})) == 4500 * KIB


def test_of_a_container_whose_page_cache_can_be_had_back(root):
    group = {
        "sys/fs/cgroup/memory.max": f"{3 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * MIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {MIB}\ninactive_file {MIB // 2}\nactive_file 0\n",
    }
    assert memory.host_free_bytes(root({"proc/meminfo": MEMINFO} | group)) == MIB * 3 // 2
    assert memory.host_free_bytes(root({"sys/fs/cgroup/memory.max": "max\n"})) == 4500 * KIB
    old = {f"sys/fs/cgroup/memory/memory.{name}": text for name, text in (
        ("limit_in_bytes", f"{2 * MIB}"), ("usage_in_bytes", f"{MIB}"), ("stat", "inactive_file 0\n"),
    )}  # fmt: skip
    assert memory.host_free_bytes(root(old)) == MIB


def test_unknown_where_the_system_does_not_say(tmp_path, root):
    assert memory.host_free_bytes(tmp_path) is None
    assert memory.host_free_bytes(root({"proc/meminfo": "MemTotal: 1 kB\n"})) is None


def test_errors_of_memory_are_known_by_their_words():
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: hbm"), RuntimeError("INTERNAL: Out of memory")):
        assert out_of_memory(error)
        with pytest.raises(OutOfMemory), memory.watched():
            raise error
    for error in (RuntimeError("INTERNAL"), RuntimeError("RESOURCE_EXHAUSTED: Error writing: No space left on device")):
        with pytest.raises(RuntimeError, match=str(error)[:8]), memory.watched():
            raise error
