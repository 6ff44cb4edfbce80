"""Before training starts: is this node ready, and do all nodes agree?

    preflight  settings, paths, packages and GPUs of this node; called by scripts/train_h800.sh
    equipment  DeepSpeed's configuration, output directory, packages
    rendezvous address, port and interface, checked before use
    network    which interface leads to the master, which port is free
    facts      what a node says about itself
    meeting    nodes exchange what they say, through a key-value store on the master
    verdicts   what must be equal on all nodes, and is not

Nothing here starts training or imports the trainer. `python -m vggt_cache.cluster --help` lists the commands.
"""
