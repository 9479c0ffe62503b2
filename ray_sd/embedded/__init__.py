"""The small models that the project trained itself, their data, and what it is made from."""
