"""A look inside a run or an export: numbers for a page, and the page."""

from trix_jax.lm.inspect.look import look as look
from trix_jax.lm.inspect.page import write_page as write_page
from trix_jax.lm.inspect.routes import Order as Order
from trix_jax.lm.inspect.routes import diff as diff
from trix_jax.lm.inspect.routes import route as route
