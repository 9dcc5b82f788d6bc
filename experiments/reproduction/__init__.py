"""The paper's experiments as cells: their models, figures and expectations."""
