"""stub"""
from functional_sam.exhibits.comparison import headline, plan
