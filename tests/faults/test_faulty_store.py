"""A store that fails, stalls, cuts answers off and loses them, or is gone for a minute: the run completes, whole."""

from __future__ import annotations

import re

import pytest

from tests.faults.scene import IMAGES, Scene, image_reads, wait_for
from tests.support.faulty_proxy import PER_REQUEST, Fault, FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GONE_SECONDS = 60.0


def check_whole(scene: Scene, proxy: FaultyProxy, name: str, output: str) -> None:
    """The run is as if nothing had happened, and says that it has retried."""
    proxy.enabled = False
    assert scene.published(name) == scene.published("undisturbed")
    assert len(image_reads(proxy.log)) == IMAGES
    report = scene.audit(name)
    assert report["ok"], report["problems"]
    retries = re.search(r"([\d,]+) retries", output)
    assert retries is not None, output
    assert int(retries[1].replace(",", "")) > 0


def test_a_run_completes_over_a_store_that_fails_at_five_per_cent_of_calls(scene: Scene, calm: FaultyProxy) -> None:
    name = "faulty"
    scene.prepare(name, like="undisturbed")
    calm.counts.clear()
    calm.enabled = True
    output = scene.finish(name)
    check_whole(scene, calm, name, output)
    print(dict(calm.counts))
    assert len({fault for fault in calm.counts if fault in PER_REQUEST}) >= 5, "every kind should have had its chance"


def test_each_fault_at_each_kind_of_publishing_call_is_survived(scene: Scene, calm: FaultyProxy) -> None:
    """What chance may miss: the answers that matter most, lost in each way."""
    name = "precise"
    scene.prepare(name, like="undisturbed")
    faults = [Fault.ERROR_BEFORE, Fault.ERROR_AFTER, Fault.RESET, Fault.RESET_AFTER, Fault.SLOW_DOWN]
    for wave, fault in enumerate(faults, start=1):
        calm.inject(fault, "PUT", rf"/{name}/index/commits/0+{wave}\.json")
        calm.inject(fault, "PUT", rf"/{name}/index/tags/candidate", times=1)
        calm.inject(fault, "PUT", rf"/{name}/embedded/wave-{wave:03d}/")
        calm.inject(fault, "PUT", rf"/{name}/index/segments/", times=2)
    output = scene.finish(name)
    assert all(injection.times == 0 for injection in calm.injections)
    check_whole(scene, calm, name, output)


def test_a_run_waits_for_a_store_that_is_gone_for_a_minute(scene: Scene, calm: FaultyProxy) -> None:
    name = "gone"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 0.5
    driver = scene.start(name)
    wait_for(calm, "PUT", rf"/{name}/index/commits/0+1\.json", driver)
    calm.outage(GONE_SECONDS)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert calm.counts[Fault.OUTAGE] > 0
    check_whole(scene, calm, name, output)
