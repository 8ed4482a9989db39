"""The model at home: what a device keeps of the fleet's model for its owner's own programs.

Read `keeper` for when a model is fetched and kept, `files` for how it lies on the disk and who vouches for
it, `export` and `child` for the process that puts it together, `hook` for the owner's command, and
`predicting` for `covey-device predict`. Nothing here ever goes back to the coordinator.
"""
