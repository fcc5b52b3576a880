"""Start several processes as one run, synchronise them, and notice when one fails."""

from jaxmm.hosts.startup import (
    HostsConfig,
    assert_same_on_all_hosts,
    barrier,
    count_hosts,
    detect_process_count,
    distributed,
    exit_status,
    heartbeat,
    join,
    of_first,
    wait_for_path,
    waiting,
)

__all__ = ["HostsConfig", "assert_same_on_all_hosts", "barrier", "count_hosts", "detect_process_count", "distributed",
           "exit_status", "heartbeat", "join", "of_first", "wait_for_path", "waiting"]
