"""The daemon's life: take the graph, serve it, and end when told to.

It can be killed at any moment: what it has mounted stays, what it was doing is undone or completed
by whoever opens the graph next, and the sockets that it leaves are replaced.
"""

import faulthandler
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from devmapper.deviceset.id_maps import container_root
from devmapper.deviceset.layer_root import make_owned
from devmapper.server import lock, registry, sockets
from devmapper.server.address import Address, show_address
from devmapper.server.config import Config, OnStop
from devmapper.server.ending import EndRequests
from devmapper.server.notify import Notifier
from devmapper.server.operations import Operations
from devmapper.server.registry import Ground, Plan
from devmapper.server.service import Service

if TYPE_CHECKING:
    from devmapper.driver import Driver

log = logging.getLogger(__name__)

_HOME_MODE: Final = 0o700  # as the device set makes it
_IDLE_SECONDS: Final = 1.0  # for a worker without a request to end
_BREAK_OFF_SECONDS: Final = 5.0  # for services to end once requests are not waited for any more
_RELEASE_SECONDS: Final = 90.0  # for unmounting and letting go of the pool
_MARGIN_SECONDS: Final = 10.0  # until the service manager takes us for hung, on a busy machine


def serve(config: Config) -> None:
    """Serve the graph until a signal asks for the end.

    If requests have to be broken off, threads still work on the graph: the process ends then
    without waiting for them, as if it were killed.

    `GraphLocked` for a second daemon, and what opening the graph and listening raise; the sockets
    and the lock are gone then.
    """
    notifier = Notifier.take()
    if notifier.watchdog_seconds:
        faulthandler.enable()  # its SIGABRT then tells in the log where each thread was
    _raise_file_limit()
    os.chdir("/")
    with ExitStack() as stack:
        plans = stack.enter_context(_taken(config))
        notifier.status(f"opening {config.root}")
        driver = stack.enter_context(_opened(config))
        requests = stack.enter_context(EndRequests())
        upper = stack.enter_context(ExitStack())  # what has to end before the pool is let go
        services = _started(plans, _ground(config, driver, upper))
        what = f"serving graph {str(config.root)!r}: {', '.join(map(_described, services))}"
        log.info("%s", what)
        notifier.ready(what)
        _wait_for_end(requests, notifier)
        log.info("told to end: requests under way have %gs", config.stop_time)
        longest = config.stop_time + _BREAK_OFF_SECONDS + _IDLE_SECONDS + _MARGIN_SECONDS
        notifier.stopping("waiting for requests under way", longest)
        if not _stop(services, config.stop_time, requests, notifier) or _workers_are_left():
            log.warning("requests were broken off; the next start undoes or completes them")
            _end_as_if_killed()
        upper.close()
        if config.on_stop is OnStop.RELEASE:
            notifier.stopping("letting go of the pool", _RELEASE_SECONDS)
            driver.cleanup()
        log.info("ended; the pool %s", _fate(config))


@contextmanager
def _taken(config: Config) -> Iterator[list[Plan]]:
    """The graph is this daemon's, and all of its addresses are free or left by a dead one."""
    home = config.root
    make_owned(home, _HOME_MODE, container_root(config.id_maps, config.id_maps))
    control = config.control_socket or lock.control_socket(home)
    with lock.only_daemon(home, control):
        plans = registry.plans(config, control)
        for plan in plans:
            _check_free(plan.address)  # before a pool is activated for nothing
        yield plans


def _check_free(address: Address) -> None:
    if isinstance(address, Path):
        sockets.check_free(address)
    else:
        socket.create_server(address).close()


@contextmanager
def _opened(config: Config) -> "Iterator[Driver]":
    from devmapper.driver import init

    driver = init(
        config.root,
        config.storage_opts,
        engine=config.engine,
        uid_maps=config.id_maps,
        gid_maps=config.id_maps,
    )
    try:
        yield driver
    finally:
        driver.close()


def _ground(config: Config, driver: "Driver", upper: ExitStack) -> Ground:
    """What the services share, from the snapshots to the watch; *upper* ends it."""
    from devmapper.server.conditions import Thresholds
    from devmapper.server.observer import Observer
    from devmapper.server.watch import PoolWatch
    from devmapper.snapshots import Snapshots

    operations = Operations()
    snapshots = upper.enter_context(closing(Snapshots(driver.devices)))
    observer = Observer(driver, snapshots)
    upper.callback(observer.stop)
    if config.watch_enabled:
        watch = PoolWatch(
            observer,
            operations,
            interval=config.watch_interval,
            thresholds=Thresholds(config.watch_data_low_water, config.watch_metadata_low_water),
        )
        upper.callback(watch.stop)
        watch.start()
    return Ground(driver, snapshots, operations, observer, config)


def _started(plans: Sequence[Plan], ground: Ground) -> list[Service]:
    services: list[Service] = []
    try:
        for plan in plans:
            service = plan.make(ground, plan.address)
            services.append(service)
            service.start()
            log.debug("%s", _described(service))
    except BaseException:
        for service in reversed(services):
            service.stop(0.0)
        raise
    return services


def _described(service: Service) -> str:
    return f"{service.name} on {show_address(service.address)}"


def _wait_for_end(requests: EndRequests, notifier: Notifier) -> None:
    watchdog = notifier.watchdog_seconds
    while requests.wait(watchdog / 2 if watchdog else None) is None:
        notifier.alive()


def _stop(
    services: Sequence[Service], seconds: float, requests: EndRequests, notifier: Notifier
) -> bool:
    """Stop them side by side; False if one does not end.

    Each is given *seconds*, until a second signal takes them back.
    """
    left = {service.name for service in services}

    def stop(service: Service, seconds: float) -> None:
        try:
            service.stop(seconds)
        except Exception:
            log.exception("the %s service did not stop", service.name)
        left.discard(service.name)
        requests.wake()

    def stop_all(seconds: float) -> None:
        for service in services:
            name = f"stop {service.name}"
            threading.Thread(target=stop, args=(service, seconds), name=name, daemon=True).start()

    stop_all(seconds)
    deadline = time.monotonic() + seconds + _BREAK_OFF_SECONDS
    watchdog = notifier.watchdog_seconds
    while left:
        pause = deadline - time.monotonic()
        if pause <= 0:
            return False
        if requests.wait(min(pause, watchdog / 2) if watchdog else pause) is not None:
            log.warning("told to end again: requests under way are broken off")
            stop_all(0.0)
            deadline = time.monotonic() + _BREAK_OFF_SECONDS
        notifier.alive()
    return True


def _workers_are_left() -> bool:
    """Whether a thread still works on a request; the process could not end before it.

    The workers of services are the only threads that the interpreter waits for at its end.
    """
    deadline = time.monotonic() + _IDLE_SECONDS
    workers = [each for each in threading.enumerate() if not each.daemon]
    workers.remove(threading.current_thread())
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    return any(worker.is_alive() for worker in workers)


def _end_as_if_killed() -> NoReturn:
    logging.shutdown()
    os._exit(0)


def _fate(config: Config) -> str:
    return "is let go" if config.on_stop is OnStop.RELEASE else "and what is mounted stay"


def _raise_file_limit() -> None:
    """A connection each for a thousand requests, and a file or two for what each of them does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
