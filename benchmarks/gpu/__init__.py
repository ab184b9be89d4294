"""Steps on a GPU, beside plain training, hand-written loops and what the device could do.

    python -m benchmarks.gpu [--problem lenet5 ...] [--json FILE]

All steps of a problem are built, warmed up and then take turns at blocks, timed by events of the
device around a block; ratios are to the step that the table calls `base`, in the same round. Two
floors stand beside: the step's arithmetic at the rate of a large matrix product, and its bytes at
the rate of a large copy, both measured in the same run. Data and networks are made up. Rows of
several chains (`lenet5-chains`) are a step of each; the floors are of one.
"""
