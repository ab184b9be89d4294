"""What a step costs beside a step of plain training: `python -m benchmarks.step_cost`.

Every method has a fresh process of its own and takes turns with the others in short blocks, so that
what else the machine does meets all alike; a ratio is that of a block to the block of `base` in the
same round. `base` is plain SGD on the same examples, a hand-written torch loop. Images and labels
are random numbers of the shapes of MNIST (LeNet5, 100 train and 50 meta examples a step) and of
CIFAR-10 (ResNet32, 60 and 60): the time of a step does not depend on what they show. One thread.

On a CPU time is the processor time of the process, which leaves out what other processes take.
Memory is the peak of the process above what it had before the first step, data and network
included; beside it stands what torch counts, the most bytes of tensors that a step holds at once.
"""
