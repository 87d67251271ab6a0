"""The web page: ask a model about pictures, and see which layer groups each question used.

:mod:`model.web.talk` answers, :mod:`model.web.panel` draws the weights, :mod:`model.web.examples` makes the pictures on board,
and :mod:`model.web.page` puts them together; it alone needs gradio.
"""
