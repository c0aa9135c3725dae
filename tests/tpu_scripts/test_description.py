"""The description: everything that is wrong with it is reported at once, before any command; types, topologies, prices and the JobSet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import TABLE, chip_of_kind, chips
from partinf.hardware.slices import parse_slice
from partinf.proof.topology import describe
from tests.tpu_scripts.support import SCRIPTS


def test_all_offences_are_reported_before_any_command(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"type": "v5litepod-17", "time_to_live": None, "zone": None, "project": None, "comand": ["x"], "command": "partinf plan"}
    assert cloud.pod("launch", cloud.describe(**wrong, spot="yes", name="Not A Name", gke={"imag": "x"})) == 2
    printed = capsys.readouterr().err
    for part in (
        "unknown key 'comand'; did you mean 'command'?",
        "'project' is missing: nothing runs without",
        "'zone' is missing",
        "'time_to_live' is missing",
        "name 'Not A Name': expected lower-case letters",
        "spot = 'yes': expected bool",
        "command = 'partinf plan': expected a list of words",
        "unknown key 'gke.imag'; did you mean 'image'?",
        "type 'v5litepod-17': no such TPU type; v5litepod comes as 1, 4, 8, 16",
    ):
        assert part in printed
    assert len(printed.splitlines()) == 9
    assert cloud.calls == []


@pytest.mark.parametrize(
    "changes,part",
    [
        ({"type": "v5e-16"}, "type 'v5e-16': no such TPU type; did you mean 'v6e-16'?"),
        (
            {"type": "v5litepod-16", "topology": "2x8"},
            "topology '2x8': v5litepod types have one topology each; 'v5litepod-16' is 16 chips as 4x4",
        ),
        ({"type": "v4-128", "topology": "4x4x8"}, "topology '4x4x8': 128 chips, but 'v4-128' is 64 chips as 4x4x4"),
        ({"type": "v4-24"}, "v4 comes as 8, 16, 32"),
        (
            {"type": "v4-64", "topology": "2x2x8"},
            "topology '2x2x8': other shapes than those of types are made of whole cubes, and 'v4-64' is",
        ),
        ({"type": "v5p-32", "topology": "16x1"}, "v5p is a 3D torus, the shape has 2 axes"),
        ({"type": "v5p-32", "topology": "big"}, "topology 'big': expected chips along each axis"),
        ({"time_to_live": "2"}, "time_to_live = '2': expected a number and a unit"),
        ({"time_to_live": "0h"}, "time_to_live = '0h'"),
        ({"retries": 1000}, "retries = 1000: expected 0 to 20"),
        ({"zone": "us-west4"}, "zone 'us-west4': expected a zone such as us-west4-a"),
        ({"project": "my project"}, "project 'my project': expected a project id"),
        ({"type": 16}, "type = 16: expected str"),
        ({"command": {}}, "command = {}: expected a list of words"),
        ({"setup": {}}, "setup = {}: expected a list of words"),
        ({"wait": []}, "wait = []: expected a number and a unit"),
        ({"name": 3}, "name = 3: expected str"),
        ({"gke": 3}, "gke = 3: expected a table"),
    ],
)
def test_one_offence(cloud, capsys: pytest.CaptureFixture[str], changes: dict, part: str) -> None:
    assert cloud.pod("check", cloud.describe(**changes)) == 2
    assert part in capsys.readouterr().err


def test_the_shipped_example_is_right(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("check", SCRIPTS / "example.toml") == 0
    assert "v5litepod-16 is v5e:4x4" in capsys.readouterr().out


def test_every_type_is_a_slice_that_partinf_knows() -> None:
    import pod_types

    for prefix, (chip, cloud) in pod_types.generations().items():
        for number, topology in cloud.topologies:
            tpu = pod_types.parse_type(f"{prefix}-{number}")
            assert tpu.slice == parse_slice(f"{chip}:{topology}")
            assert tpu.num_chips * cloud.cores_per_number == int(number)
            assert tpu.num_hosts * tpu.chips_per_host == tpu.num_chips
            assert pod_types.type_of_slice(tpu.slice) == tpu


@pytest.mark.parametrize(
    "name,chips,hosts",
    [
        ("v5litepod-16", 16, 4),
        ("v5litepod-8", 8, 1),
        ("v4-128", 64, 16),
        ("v6e-8", 8, 1),
        ("v5p-32", 16, 4),
        ("v6e-1", 1, 1),
        ("tpu7x-16", 8, 2),
    ],
)
def test_chips_and_hosts(name: str, chips: int, hosts: int) -> None:
    import pod_types

    tpu = pod_types.parse_type(name)
    assert (tpu.num_chips, tpu.num_hosts) == (chips, hosts)


def test_another_topology_is_requested_by_its_shape(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("create", cloud.describe(type="v4-512", topology="4x4x16", confirm_above_chips=256), "--run-id", "r1") == 0
    create = cloud.calls[0]
    assert "--type=v4" in create
    assert "--topology=4x4x16" in create
    assert not any(word.startswith("--accelerator-type") for word in create)


def test_a_slice_that_no_type_gives_is_refused() -> None:
    import pod_types

    for name in ("h200:8", "v5e:2x2*2", "v5e:1x8", "v4:2x2x8"):
        with pytest.raises(InvalidInput, match="no TPU type gives it"):
            pod_types.type_of_slice(parse_slice(name))


def test_a_section_of_the_hardware_table_makes_a_chip_known_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To planner, proof, devices, cloud and prices: no other file has to change."""
    import pod_types

    text = resources.package_file(TABLE).read_text()
    begin, end = text.index("[v6e]"), text.index("[tpu7x]")
    section = text[begin:end].replace("v6e", "v77q").replace('device_kinds = ["tpu v6 lite", "tpu v77q"]', 'device_kinds = ["tpu v77"]')
    (tmp_path / "table.toml").write_text(text + "\n" + section)
    monkeypatch.setattr(resources, "package_file", lambda _: tmp_path / "table.toml")
    chips.cache_clear()
    try:
        slice_ = parse_slice("v77q:2x4")
        assert chip_of_kind("TPU v77") is slice_.chip
        assert describe(slice_) == ("v77q:2x4", {})
        assert pod_types.type_of_slice(slice_).name == "v77q-8"
        assert pod_types.parse_type("v77q-8").cloud.runtime == "v2-alpha-tpuv77q"
        assert slice_.chip.price is not None
    finally:
        chips.cache_clear()


def test_the_cost_is_an_upper_bound_that_names_its_source(cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe(type="v5litepod-16", time_to_live="2h", spot=True)
    assert cloud.pod("check", description) == 0
    printed = capsys.readouterr().out
    assert "v5e:4x4, 16 chips on 4 hosts" in printed
    assert "at most 38.40 USD" in printed
    assert "cloud.google.com/tpu/pricing; not checked against its source" in printed
    head = 'currency = "EUR"\ndate = "2030-01-01"\nsource = "a contract"\nchecked = true\n'
    mine = tmp_path / "prices.toml"
    mine.write_text(head + "[chip_hour.v5e]\non_demand = 2.0\nspot = 0.5\n")
    assert cloud.pod("check", description, "--prices", str(mine)) == 0
    assert "at most 16.00 EUR: 16 v5e chips x 2 h x 0.5 per chip-hour (spot, list of 2030-01-01, a contract)" in capsys.readouterr().out
    mine.write_text(head + "[chip_hour.v4]\non_demand = 2.0\n")
    assert cloud.pod("launch", description, "--prices", str(mine)) == 2
    assert "no price for 'v5e'" in capsys.readouterr().err
    mine.write_text(head + "[chip_hour.v5e]\nspot = 'cheap'\n")
    assert cloud.pod("launch", description, "--prices", str(mine)) == 2
    printed = capsys.readouterr().err
    assert "chip_hour.v5e needs a number for 'on_demand'" in printed
    assert "chip_hour.v5e needs a number for 'spot'" in printed
    assert cloud.pod("launch", cloud.describe(type="tpu7x-8")) == 2  # nothing is created without a known price
    assert "there is no list price for 'tpu7x'; give one with --prices FILE" in capsys.readouterr().err
    assert cloud.calls == []


def test_the_jobset_of_a_description(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe(type="v5litepod-16", spot=True, gke={"image": "an/image:1"})
    assert cloud.pod("manifest", description, "--run-id", "r1") == 0
    jobset = json.loads(capsys.readouterr().out)
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "my-run-r1")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["activeDeadlineSeconds"]) == (4, 4, 3600)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert cloud.pod("manifest", cloud.describe(), "--run-id", "r1") == 2
    assert "'gke.image' is missing" in capsys.readouterr().err


GKE = {"image": "an/image:1", "context": "my-cluster"}


def test_a_jobset_runs_and_is_deleted(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe(command=["bash", "-c", 'echo "$PARTINF_RUN_ID  $0"', "two words"], gke=GKE)
    assert cloud.pod("gke", description, "--run-id", "r1", "--dry-run") == 0
    dry = capsys.readouterr().out.splitlines()
    assert cloud.pod("gke", description, "--run-id", "r1") == 0
    assert [line.removeprefix("+ ") for line in capsys.readouterr().err.splitlines() if line.startswith("+ ")] == dry
    logs = cloud.folder / "my results" / "my-run-r1" / "logs.txt"
    assert logs.read_text() == "[pod/0] r1  two words\n[pod/1] r1  two words\n"
    assert cloud.state["jobsets"] == {}
    assert all("--context=my-cluster" in call for call in cloud.calls)


@pytest.mark.parametrize("step", ["apply", "get", "logs", "delete"])
def test_a_jobset_is_deleted_whatever_fails(cloud, step: str) -> None:
    cloud.script(fail={f"kubectl-{step}": {"get": 1000}.get(step, 1)})
    code = cloud.pod("gke", cloud.describe(gke=GKE), "--run-id", "r1")
    assert code == (1 if step in ("apply", "get") else 0)
    assert cloud.state["jobsets"] == {}


@pytest.mark.parametrize("step", ["apply", "get"])
def test_a_jobset_is_deleted_after_an_interrupt(cloud, step: str) -> None:
    cloud.script(interrupt=f"kubectl-{step}")
    assert cloud.pod_process("gke", cloud.describe(gke=GKE), "--run-id", "r1").returncode == 130
    assert cloud.state["jobsets"] == {}


def test_a_jobset_without_a_cluster_is_refused(cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.pod("gke", cloud.describe(gke={"image": "an/image:1"}), "--run-id", "r1") == 2
    assert "'gke.context' is missing" in capsys.readouterr().err
    assert cloud.calls == []
