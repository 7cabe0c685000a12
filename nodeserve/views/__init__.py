"""What a person looks at: one `Frame` of the node's state, from what the server says of itself.

Pure: no clock, no socket. The terminal view and the web page show the same frame.
"""

from nodeserve.views.frame import Frame as Frame
from nodeserve.views.frame import Quantiles as Quantiles
from nodeserve.views.frame import Span as Span
from nodeserve.views.frame import Worker as Worker
from nodeserve.views.frame import to_json as to_json
from nodeserve.views.history import History as History
from nodeserve.views.history import blocks_of as blocks_of
