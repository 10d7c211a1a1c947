"""The Space: a page in which anybody turns dials and reads the base model's answer beside the edited one.

What is worth testing lives here, without gradio: state, engine, insight, sweep, take_home, limits. The page itself
(page, circle, views) is built on top and is the only part that imports gradio.
"""
