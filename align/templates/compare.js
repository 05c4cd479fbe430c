withPlotly(Promise.resolve(), drawFigures);
