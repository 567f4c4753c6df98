"""The daemon's life: take the graph, serve it, and end when told to.

It can be killed at any moment: what it has mounted stays, what it was doing is undone or completed
by whoever opens the graph next, and the sockets that it leaves are replaced.
"""

import logging
import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from devmapper.deviceset.id_maps import container_root
from devmapper.deviceset.layer_root import make_owned
from devmapper.server import lock, registry, sockets
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


def serve(config: Config) -> None:
    """Serve the graph until a signal asks for the end.

    If requests have to be broken off, threads still work on the graph: the process ends then
    without waiting for them, as if it were killed.

    `GraphLocked` for a second daemon, and what opening the graph and listening raise; the sockets
    and the lock are gone then.
    """
    from devmapper.server.observer import Observer
    from devmapper.server.watch import watching

    notifier = Notifier()
    _raise_file_limit()
    os.chdir("/")
    with ExitStack() as stack:
        control, plans = stack.enter_context(_taken(config))
        notifier.status(f"opening {config.root}")
        operations = Operations()
        driver = stack.enter_context(_opened(config))
        requests = stack.enter_context(EndRequests())
        snapshots = _snapshots(driver)
        observer = Observer(driver, snapshots)
        stack.callback(observer.stop)
        ground = Ground(driver, snapshots, operations, control, observer)
        services = _started(plans, ground)
        watch = stack.enter_context(watching(config, observer, operations))
        what = f"serving graph {str(config.root)!r}: {', '.join(map(str, plans)) or 'nobody'}"
        log.info("%s", what)
        notifier.ready(what)
        _wait_for_end(requests, notifier)
        log.info("told to end: requests under way have %gs", config.stop_time)
        notifier.stopping("waiting for requests under way")
        if not _stop(services, config.stop_time, requests, notifier) or _workers_are_left():
            log.warning("requests were broken off; the next start undoes or completes them")
            _end_as_if_killed()
        watch.stop()  # before what it looks at is let go
        if snapshots is not None:
            snapshots.close()
        if config.on_stop is OnStop.RELEASE:
            notifier.stopping("letting go of the pool")
            driver.cleanup()
        log.info("ended; the pool %s", _fate(config))


@contextmanager
def _taken(config: Config) -> Iterator[tuple[Path, list[Plan]]]:
    """The graph is this daemon's, and all of its addresses are free or left by a dead one."""
    home = config.root
    make_owned(home, _HOME_MODE, container_root(config.id_maps, config.id_maps))
    control = config.control_socket or lock.control_socket(home)
    with lock.only_daemon(home, control):
        plans = registry.plans(config, control)
        for plan in plans:
            if isinstance(plan.address, Path):
                sockets.check_free(plan.address)  # before a pool is activated for nothing
        yield control, plans


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


def _snapshots(driver: "Driver") -> Any:  # noqa: ANN401 - see registry
    return (
        registry.imported("snapshots")(driver.devices) if registry.is_there("snapshots") else None
    )


def _started(plans: Sequence[Plan], ground: Ground) -> list[Service]:
    services: list[Service] = []
    try:
        for plan in plans:
            service = plan.make(ground)
            services.append(service)
            service.start()
            log.debug("%s", plan)
    except BaseException:
        for service in reversed(services):
            service.stop(0.0)
        raise
    return services


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
    ended = _stopping(services, seconds, requests)
    deadline = time.monotonic() + seconds + _BREAK_OFF_SECONDS
    watchdog = notifier.watchdog_seconds
    while not all(event.is_set() for event in ended):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if requests.wait(min(left, watchdog / 2) if watchdog else left) is not None:
            log.warning("told to end again: requests under way are broken off")
            ended += _stopping(services, 0.0, requests)
            deadline = time.monotonic() + _BREAK_OFF_SECONDS
        notifier.alive()
    return True


def _stopping(
    services: Sequence[Service], seconds: float, requests: EndRequests
) -> list[threading.Event]:
    """An event for each service, set before *requests* wakes: a thread would live on a moment."""

    def stop(service: Service, ended: threading.Event) -> None:
        try:
            service.stop(seconds)
        except Exception:
            log.exception("the %s service did not stop", service.name)
        ended.set()
        requests.wake()

    events = []
    for service in services:
        ended = threading.Event()
        threading.Thread(
            target=stop, args=(service, ended), name=f"stop {service.name}", daemon=True
        ).start()
        events.append(ended)
    return events


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
