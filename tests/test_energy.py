"""Counters of joules against files and a driver made by hand; peak rates; and what a
run's summary says about its cost.
"""

import json
import sys
import threading
import types

import jax
import pytest
from runs import Killed, killed_after, load_config, run_config

from jaxreason.plan import chips
from jaxreason.runtime import energy, ledger, peak, processes


def package(folder, number: int, name: str = "", microjoules: int = 0, most: int = 10_000_000):
    """Make the files of a RAPL domain."""
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{name or f'package-{number}'}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")
    return zone / "energy_uj"


def test_packages_are_added_up_and_wrap_around(tmp_path):
    first, second = package(tmp_path, 0, microjoules=9_000_000), package(tmp_path, 1, microjoules=5)
    package(tmp_path, 2, name="psys", microjoules=77)  # the whole board: contains the packages
    (tmp_path / "intel-rapl:0:0").mkdir()  # the cores of package 0: contained in it
    meter = energy.Meter("rapl", energy.package_domains(tmp_path))
    assert meter.lap() == 0
    first.write_text("9500000")
    second.write_text("2000005")
    assert meter.lap() == pytest.approx(0.5 + 2)
    first.write_text("250000")  # it counts to 10 J and continues from 0
    assert meter.lap() == pytest.approx(0.75)
    assert meter.joules() == pytest.approx(3.25)
    meter.close()


def test_long_stretches_are_read_in_between(tmp_path, monkeypatch):
    """A counter that wraps around twice between two readings would lose a turn."""
    monkeypatch.setattr(energy, "POLL_S", 0.01)
    package(tmp_path, 0)
    meter, again = energy.Meter("rapl", energy.package_domains(tmp_path)), threading.Event()
    monkeypatch.setattr(energy.Meter, "joules", lambda self: again.set() or 0.0)
    assert again.wait(60)
    meter.close()


def test_what_can_not_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(energy.NoCounter, match="has no CPU package"):
        energy.package_domains(tmp_path)
    counter = package(tmp_path, 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.open_meter(None).source == "rapl"

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(counter), "read_text", refuse)
        with pytest.raises(
            energy.NoCounter, match=r"energy_uj is readable by root alone; 'sudo chmod a\+r .*energy_uj' allows it"
        ):
            energy.microjoules(counter)
    counter.write_text("")
    for watts, source in ((None, None), (35.0, "watts")):
        meter = energy.open_meter(watts)
        assert meter.source == source
        assert "energy_uj can't be read" in meter.reason
        assert meter.lap() == 0
    assert meter.divide(0.0, {"learn": 2.0, "compile": 1.0}) == {"learn": 70.0, "compile": 35.0}
    with pytest.raises(energy.NoCounter, match="TPUs have no counter"):
        energy.find_counters("tpu")


def test_a_counter_that_fails_later_is_given_up(tmp_path):
    counter = package(tmp_path, 0)
    meter = energy.Meter("rapl", energy.package_domains(tmp_path), watts=10.0)
    counter.write_text("1000000")
    assert meter.lap() == 1
    counter.unlink()
    assert meter.lap() == 0
    assert meter.source == "watts"
    assert "No such file" in meter.reason


def test_metered_joules_are_divided_by_time(tmp_path):
    meter = energy.Meter("rapl")
    assert meter.divide(12.0, {"sample": 3.0, "compile": 1.0}) == {"sample": 9.0, "compile": 3.0}
    assert meter.divide(12.0, {"sample": 0.0}) == {"sample": 0.0}


def test_processes_of_one_machine_count_a_package_once(tmp_path, monkeypatch):
    package(tmp_path, 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    found = energy.package_domains(tmp_path)[0].name
    monkeypatch.setattr(processes, "gather", lambda item: [("rapl", [found], ""), item])
    for process, mine in ((0, 1), (1, 0)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert len(energy.open_meter(None)._domains) == mine
    monkeypatch.setattr(processes, "gather", lambda item: [(None, [], "no file"), item])
    assert (energy.open_meter(None).source, energy.open_meter(None).reason) == (None, "no file")


class Driver(types.ModuleType):
    """NVML with four GPUs; GPU i has used i + 1 joules."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.used_mj, self.broken = [1000, 2000, 3000, 4000], False

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return len(self.used_mj)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return (b"GPU-aa1", "GPU-aa2", "GPU-b", "GPU-c")[handle]  # old versions return bytes

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle == 3:
            raise self.NVMLError("Not Supported")
        return self.used_mj[handle]


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


@pytest.mark.parametrize(
    ("visible", "handles"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-b, GPU-aa1", [2, 0]),
        ("GPU-b,1", [2, 1]),
        ("1,9,0", [1]),  # as CUDA: nothing after an entry that fits no GPU
        ("GPU-aa,0", []),  # fits two
        ("", []),
        ("-1", []),
    ],
)
def test_visible_gpus_are_those_of_cuda(driver, visible, handles):
    assert energy.visible_handles(driver, visible) == handles


def test_gpus_are_metered(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,0")
    domains = energy.gpu_domains([0, 1])
    assert [domain.name for domain in domains] == ["GPU-b", "GPU-aa1"]
    meter = energy.Meter("nvml", domains)
    driver.used_mj = [1500, 99000, 3250, 0]
    assert meter.lap() == pytest.approx(0.75)
    driver.used_mj[0] = 10  # the driver was loaded again
    assert meter.lap() == 0
    driver.used_mj[0] = 1010
    assert meter.lap() == pytest.approx(1)


def test_gpus_without_a_counter_say_why(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(energy.NoCounter, match="NVML: Not Supported"):
        energy.Meter("nvml", energy.gpu_domains([0]))
    with pytest.raises(energy.NoCounter, match="NVML shows 1 of the visible GPUs, and jax 2"):
        energy.gpu_domains([0, 1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0a")
    with pytest.raises(energy.NoCounter, match="MIG-0a, a part of a GPU"):
        energy.gpu_domains([0])
    driver.broken = True
    with pytest.raises(energy.NoCounter, match="NVML: Driver Not Loaded"):
        energy.gpu_domains([0])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(energy.NoCounter, match=r"pip install 'jaxreason\[gpu\]'"):
        energy.gpu_domains([0])


# --- peak rates ---


def test_the_tables_of_chips_agree():
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}
    for name, chip in chips.CHIPS.items():
        assert peak.PEAKS[kinds[name]] == (chip.flops_per_s, chip.hbm_bytes_per_s)


def test_peak_rates_are_looked_up_or_measured(monkeypatch):
    chip = types.SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    assert peak.find(chip, "bfloat16", False) == peak.Peak("NVIDIA H200", 989e12, 4800e9, "table")
    host = jax.local_devices()[0]
    assert peak.find(host, "float32", False) is None
    monkeypatch.setattr(peak, "MEASURED_S", 0.0)
    measured = peak.find(host, "float32", True)
    assert measured.source == "measured"
    assert min(measured.flops_per_s, measured.bytes_per_s) > 0


# --- a run ---


def test_a_run_meters_its_work(tmp_path, monkeypatch):
    """A counter rises by a joule at every reading, so each kind of work gets some; a
    resumed run keeps what was booked though the counter begins anew.
    """
    folder, count = tmp_path / "powercap", [0]
    package(folder, 0)
    monkeypatch.setattr(energy, "POWERCAP", folder)

    def rise(path):
        count[0] += 1
        return float(count[0])

    monkeypatch.setattr(energy, "microjoules", rise)
    few = {"prior.steps": 3, "rl.steps": 2, "sharding.mesh.data": 1, "log.watts": 40.0, "checkpoint.every_steps": 2}
    few |= {"log.measure_machine": True}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            run_config(load_config("tiny", "smoke", **few), tmp_path)
    count[0] = 0
    summary = run_config(load_config("tiny", "smoke", **few), tmp_path)
    assert summary["joules_from"] == "rapl"
    used = summary["ledger"]
    assert all(used[kind]["joules"] > 0 for kind in ("sample", "learn", "evaluate", "compile"))
    # Two readings per step and lap, and none of them are lost or counted twice.
    assert sum(amounts["joules"] for amounts in used.values()) < 2 * 2 * (5 + 2) + 2 * 6
    assert summary["peak"]["source"] == "measured"
    assert all(shares["mfu"] > 0 for shares in summary["utilisation"].values())
    assert summary["utilisation"]["sample"]["bandwidth"] > 0
    assert summary["utilisation"]["learn"]["bandwidth"] is None


def test_a_run_without_a_counter_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    few = {"phases": ("prior",), "prior.steps": 2, "sharding.mesh.data": 1}
    summary = run_config(load_config("tiny", "smoke", **few), tmp_path)
    assert (summary["joules_from"], summary["peak"], summary["utilisation"]) == (None, None, None)
    assert json.loads((tmp_path / "summary.json").read_text())["per_correct_answer_gained"] is None
    assert " J" not in capsys.readouterr().out


def test_an_older_checkpoint_lacks_units():
    old = {kind: {"tokens": 1.0, "flops": 2.0, "device_s": 3.0, "joules": 0.0} for kind in ("sample", "learn")}
    found = ledger.complete(old)
    assert found["sample"] == old["sample"] | {"bytes": 0.0}
    assert found["compile"] == ledger.empty()["compile"]
