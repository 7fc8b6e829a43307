"""What the scripts share, and the unit of copying: one script and this folder work anywhere. It imports nothing.

The vocabulary, used everywhere:

    split     images [N, C, H, W] and labels [N], in memory on the training device
    mask      {parameter name: bool tensor}, True = the weight survives
    state     a state dict: parameters and buffers
    ticket    a mask with its initial state, config and results, and the file r<n>.pt that holds them
    endpoint  a ticket trained on real data in one data order
    point     a place in weight space
    sparsity  the fraction of prunable weights removed
    config    a flat dict of plain values, saved with every result

Prunable are the weights of every convolution and linear layer, first and last included. "Paper" is
"On Synthetic Data and Iterative Magnitude Pruning: a Linear Mode Connectivity Study", "IDC" is
Kim et al. 2022, whose augmentation and distilled data the paper uses.

The rooms, each using only those above it:

    errors, interrupts, bars, ranks   ground: mistakes, signals, how far work has come, several processes
    files, curves, streams            atomic files, curves of trainings, random numbers
    networks, masks                   ConvNet3 and ResNets; mask algebra
    kernels/                          the Python side of csrc/: the ops, and faster views of a network
    augment, arrays, pictures, data   DSA and CutMix; what users' arrays and pictures mean; splits of real data
    graph                             any network as the operations of its forward pass
    distilled                         distilled sets of every published format
    captured, together                a training step as a CUDA graph; several trainings on one GPU
    training, evaluation, scores      SGD under a mask; losses of networks and of points; what to prune without training
    tangents, spectrum                directions through every layer; the Hessian's products and eigenvalues
    symmetries, matching, planes      weight space: units that may be relabelled, and are; planes through networks
    tickets, runs, figures            mask files; the folders of runs of prune.py, and their pictures
    overlap, endpoints                what two runs' masks share; the networks trained from tickets
    cli                               flags, errors in one line, how a script starts
    embedded/                         digits, and distilled sets of CIFAR-10 and digits
"""
