"""The Python side of csrc/: it changes how fast a network runs, never what it computes.

    build       find the extension or build it, once; without one everything below is plain PyTorch
    ops         each op with its PyTorch reference, its shapes and its gradient
    dense       views of a network in which runs of layers are one op
    sparse      views that meet the surviving weights only
    crossover   where a network turns sparse, timed on this machine
    views       the fastest faithful view of a network: what the rest of the project asks for
    points      many points of weight space on the same images
"""
