"""Look at what runs left behind: each module is an entry point of its own and reads run
folders only.
"""
