"""What people see of a cluster: the command line, and the doctor. It looks and never decides.

kvray COMMAND ──▶ cli ──▶ kvray.cluster (Ray calls)
                   ├──▶ local_ray     a Ray cluster that `kvray start` has begun
                   ├──▶ tables        what is printed for people
                   └──▶ doctor ◀── facts: what the nodes say of themselves
"""
