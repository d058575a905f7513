"""What `mcore-lab new` writes: a recipe module and its test, under the name that it is given."""
