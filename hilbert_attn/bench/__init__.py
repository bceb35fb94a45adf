"""Measuring: every speed that this project quotes comes from here. Nothing else imports it."""
from hilbert_attn.bench.contenders import *
from hilbert_attn.bench.cpu import *
from hilbert_attn.bench.crossover import *
from hilbert_attn.bench.gpu_model import *
from hilbert_attn.bench.machine import *
from hilbert_attn.bench.measuring import *
from hilbert_attn.bench.memory import *
from hilbert_attn.bench.results import *
from hilbert_attn.bench.short import *
from hilbert_attn.bench.suites import *
