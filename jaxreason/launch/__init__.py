"""Run a config on machines elsewhere: Cloud TPU VMs, and GPU machines reached by ssh.

    machines   accelerator types: chips, hosts, software, prices
    gcloud     the command lines of gcloud, and what their answers mean
    shell      runs commands, or prints them (--dry_run)
    source     this checkout as one archive: the commit and the changes to it
    remote     the scripts that run on the machines: install, start, look
    target     a set of machines: all of a TPU slice, or one behind ssh
    launch     the steps, in order, and what happens after a preemption
    state      the file that lets another terminal look at a launch

It drives `gcloud` and `ssh`; no library of a cloud is needed.
"""
