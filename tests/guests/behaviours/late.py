VALUE = 'imported late'
