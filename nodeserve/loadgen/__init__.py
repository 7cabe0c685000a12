"""A load generator: sends requests to a server on schedule and says how it served them.

`fleet.Fleet` drives client processes, `measure.measure` turns what they saw into numbers.
Schedules, goodput and the search for a rate are in `plan`, where nothing is sent.
"""
