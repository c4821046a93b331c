"""A real multi-node Slurm cluster on one machine, for rehearsing what clusters do to jobs.

Every node is a set of Linux namespaces (network, PIDs, mounts, host name, IPC) with its own slurmd; they share one
file system, as nodes of a real cluster do. Two more sets carry what the nodes need: `ctl` runs slurmctld, slurmdbd and
a private MariaDB; `site` runs the network switch and munge. The machine itself is the login node.

    layout.py      where everything lies and what it is called: paths, addresses, shape
    preflight.py   what must be on this machine first
    render.py      templates of slurm/sandbox -> configuration files                     pure
    boot.py        what each node starts, in order, and when it counts as started        pure
    node.py        PID 1 of every node
    processes.py   starting and ending nodes; a process is ours only if its start time says so
    network.py     cables between the switch, the nodes and this machine
    cluster.py     Sandbox: up, down, status, crash, cut, heal, run
    status.py      one line for each machine
"""
