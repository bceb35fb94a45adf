"""The demo: attention along five curves on a photo. Nothing else imports it."""
from hilbert_attn.demo.comparison import *
from hilbert_attn.demo.photo import *
from hilbert_attn.demo.pictures import *
from hilbert_attn.demo.report import *
