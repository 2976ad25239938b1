"""What jbptt costs beside what a user would pick instead:
`python -m benchmarks speed|memory|analysis|accuracy`.
"""
